"""One row of numbers for each image, ordered by the image's place in the draw; every column is kept once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from sdprune.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class ImageBatch:
    """Some images of a draw.

    Args:
        images: uint8 [b, 3, h, w].
        prompts: [b]; None where no column reads them.
        positions: [b], the images' places in the draw.
        dense: the dense model's images, uint8 [b, 3, h, w]; None means that `images` are these.
    """

    images: Tensor
    prompts: Sequence[str] | None
    positions: Tensor | Sequence[int]
    dense: Tensor | None = None

    def texts(self) -> Sequence[str]:
        """The prompts. Raises ValueError unless there is one for each image."""
        prompts = self.prompts or ()
        if len(prompts) != len(self.images):
            raise ValueError(f"Every image needs one prompt: {len(self.images)} images, {len(prompts)} prompts.")
        return prompts


def no_weights(device: torch.device | str) -> None:
    """What a column without a network loads."""


@dataclass(frozen=True)
class Column:
    """One number or vector for each image.

    Args:
        key: under which a record keeps it. Columns of equal keys hold equal numbers, and are computed once.
        values: [b, ...] of a batch.
        prepare: loads the weights on a device; raises InputError when they cannot be had.
        facts: JSON-able facts that the values depend on, for identities.
        needs_dense: whether it reads the dense model's images.
    """

    key: str
    values: Callable[[ImageBatch], Tensor]
    prepare: Callable[[torch.device | str], None] = no_weights
    facts: Mapping[str, Any] = field(default_factory=dict)
    needs_dense: bool = False


Rows = Mapping[str, Tensor]
"""Columns [n, ...] of one set of images by key, in drawn order."""


class MeasuredRows(dict[str, Tensor]):
    """Rows with what `once` worked out from them."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.made: dict[Any, Any] = {}


def once(method: Callable[..., T]) -> Callable[..., T]:
    """A method `(self, data, ...)` whose result stays with the data, so that `compute` and `compare` share it.

    Data are `MeasuredRows` or `Statistics`; with a plain mapping the method runs every time.
    """

    @wraps(method)
    def remembering(self: Any, data: Any, *rest: Any) -> T:
        made, key = getattr(data, "made", {}), (self, method.__qualname__, *rest)
        if key not in made:
            made[key] = method(self, data, *rest)
        return made[key]

    return remembering


class PerImageRows(Metric):
    """A torchmetrics Metric that keeps one row for each image under each of `keys`.

    States are concatenated over processes and sorted by position, so the same batches give the same bits on any
    number of processes and in any order, and rows of a pruned and a dense model pair up image by image. Positions
    are the places of the images in the drawn order; together they must be exactly 0 .. n - 1.

    After the last update call `gather` on every process: from then on everything is local. Without, `compute` and
    `rows` are called on every process, and gather.
    """

    full_state_update = False
    positions: list[Tensor]

    def __init__(self, keys: Iterable[str]) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.add_state("positions", default=[], dist_reduce_fx="cat")
        for key in self.keys:
            self.add_state(_state(key), default=[], dist_reduce_fx="cat")
        self._ordered: MeasuredRows | None = None

    def append(self, positions: Tensor | Sequence[int], columns: Rows) -> None:
        """Add rows: positions [b] and, for each key, a tensor [b, ...]. Raises ValueError for unequal numbers."""
        places = torch.as_tensor(positions, dtype=torch.int64)
        sizes = {"positions": len(places)} | {key: len(columns[key]) for key in self.keys}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Every image needs one row of each kind, got {sizes}.")
        # What torchmetrics does around `update`, for rows that come in by another door.
        self._ordered = self._computed = None
        self._update_count += 1
        self.positions.append(places.to(self.device))
        for key in self.keys:
            getattr(self, _state(key)).append(columns[key].detach().to(self.device))

    def gather(self) -> None:
        """Bring the rows of all processes to each of them; what follows, `compute` too, is local. Collective."""
        self._gathered()
        self._to_sync = False

    def rows(self) -> dict[str, Tensor]:
        """All rows by key, ordered by position, on the CPU: what a record keeps. Gathers when not yet gathered.

        Raises:
            RuntimeError: positions that are not 0 .. n - 1, once each.
        """
        return {key: column.cpu() for key, column in self._gathered().items()}

    def load_rows(self, rows: Rows) -> None:
        """Take a record's rows in place of what was collected; each process holds all. Raises InputError for others."""
        kept = self._checked(rows)
        self.reset()
        self._to_sync = False  # each process has them all: gathering would count them once a process
        self.append(range(max(map(len, kept.values()), default=0)), kept)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._ordered = None
        self._to_sync = self.sync_on_compute

    def _gathered(self) -> MeasuredRows:
        """All rows in order: on a GPU if the metric is there, for algebra in float64, else on the CPU."""
        if self._ordered is None:
            if self._is_synced:
                self._ordered = self._sort()
            else:
                with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
                    self._ordered = self._sort()
        return self._ordered

    def _checked(self, rows: Rows) -> dict[str, Tensor]:
        """The rows of `keys`, of equal lengths."""
        kept = {key: torch.as_tensor(rows[key]) for key in self.keys if key in rows}
        if len(kept) < len(self.keys) or len({len(column) for column in kept.values()}) > 1:
            found = ", ".join(f"{key} {list(column.shape)}" for key, column in rows.items()) or "none"
            raise InputError(
                f"These are not the rows of {type(self).__name__}: wanted {', '.join(self.keys)} of one length; got "
                f"{found}."
            )
        return kept

    def _sort(self) -> MeasuredRows:
        if not len(self.positions):
            raise RuntimeError(f"{type(self).__name__} has seen no images.")
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        positions, order = _joined(self.positions).to(device).sort(stable=True)
        n, distinct = len(positions), len(positions.unique())
        if distinct < n or positions[0] != 0 or positions[-1] != n - 1:
            raise RuntimeError(
                f"{type(self).__name__} wants each position 0 .. {n - 1} once: got {n} rows, {distinct} distinct "
                f"positions from {int(positions[0])} to {int(positions[-1])}."
            )
        return MeasuredRows({key: _joined(getattr(self, _state(key))).to(device)[order] for key in self.keys})

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Gather the states; a process without images joins in with empty ones of the right shape and type."""
        names = ("positions", *map(_state, self.keys)) if self.positions else ()
        own = {name: (getattr(self, name)[0].shape[1:], getattr(self, name)[0].dtype) for name in names}
        of_all: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(of_all, own, group=process_group)
        filled = next((shapes for shapes in of_all if shapes), None)
        if filled is None:
            return
        if not self.positions:
            for name, (shape, dtype) in filled.items():
                setattr(self, name, [torch.empty((0, *shape), dtype=dtype, device=self.device)])
        super()._sync_dist(dist_sync_fn, process_group)


def _state(key: str) -> str:
    """Name of a column's state, which no attribute of a Metric has."""
    return f"column {key}"


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    """A cat state as one tensor: a list before the processes are gathered, a tensor afterwards."""
    return state if isinstance(state, Tensor) else torch.cat(state)
