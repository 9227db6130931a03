"""What every metric here shares: one row of numbers for each image, ordered by the image's place in the draw."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from sdprune.errors import InputError

if TYPE_CHECKING:
    from sdprune.metrics.extractors import FeatureExtractor


class PerImageRows(Metric):
    """A torchmetrics Metric that keeps one row per image in each of its `columns`.

    States are concatenated over processes and sorted by position, so the same batches give the same bits on any
    number of processes and in any order, and rows of a pruned and a dense model pair up image by image. Positions
    are the places of the images in the drawn order; together they must be exactly 0 .. n - 1.
    """

    columns: ClassVar[tuple[str, ...]]
    name: str
    full_state_update = False
    positions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("positions", default=[], dist_reduce_fx="cat")
        for column in self.columns:
            self.add_state(column, default=[], dist_reduce_fx="cat")
        self._ordered: tuple[Tensor, dict[str, Tensor]] | None = None

    def keys(self) -> dict[str, str]:
        """Under which name a record keeps each column. Metrics that hold the same numbers name them alike."""
        return {column: f"{self.name}.{column}" for column in self.columns}

    def append(self, positions: Tensor | Sequence[int], **columns: Tensor) -> None:
        """Add rows: positions [b] and, for each column, a tensor [b, ...].

        Raises:
            ValueError: numbers of rows that differ.
        """
        places = torch.as_tensor(positions, dtype=torch.int64)
        sizes = {"positions": len(places)} | {name: len(rows) for name, rows in columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Every image needs one row of each kind, got {sizes}.")
        # What torchmetrics does around `update`, for rows that come in by another door.
        self._ordered = self._computed = None
        self._update_count += 1
        self.positions.append(places.to(self.device))
        for name in self.columns:
            getattr(self, name).append(columns[name].detach().to(self.device))

    def ordered(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions [n] and the columns [n, ...], sorted by position, on the CPU; gathers when not yet gathered.

        Raises:
            RuntimeError: positions that are not 0 .. n - 1, once each.
        """
        if self._ordered is None:
            if self._is_synced:
                self._ordered = self._sort()
            else:
                with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
                    self._ordered = self._sort()
        return self._ordered

    def gather(self) -> None:
        """Bring the rows of all processes to each of them; what follows, `compute` too, is local. Collective."""
        self.ordered()
        self._to_sync = False

    def rows(self) -> dict[str, Tensor]:
        """All rows by column, ordered by position, on the CPU: what a record keeps."""
        return dict(self.ordered()[1])

    def load_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Take the rows of a record in place of whatever was collected; every process holds all of them.

        Raises:
            InputError: columns of another metric.
        """
        kept = self._checked(rows)
        self.reset()
        self._to_sync = False  # each process has them all: gathering would count them once a process
        self.append(range(len(next(iter(kept.values())))), **kept)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._ordered = None
        self._to_sync = self.sync_on_compute

    def _checked(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The columns of `rows` as CPU tensors of equal length."""
        kept = {name: torch.as_tensor(rows[name]).cpu() for name in self.columns if name in rows}
        if len(kept) < len(self.columns) or len({len(column) for column in kept.values()}) > 1:
            found = ", ".join(f"{name} {list(column.shape)}" for name, column in rows.items()) or "none"
            wanted = ", ".join(self.columns)
            raise InputError(
                f"These rows are not of {type(self).__name__}: wanted {wanted} of one length; got {found}."
            )
        return kept

    def _sort(self) -> tuple[Tensor, dict[str, Tensor]]:
        if not len(self.positions):
            raise RuntimeError(f"{type(self).__name__} has seen no images.")
        positions, order = _joined(self.positions).cpu().sort(stable=True)
        n, distinct = len(positions), len(positions.unique())
        if distinct < n or positions[0] != 0 or positions[-1] != n - 1:
            raise RuntimeError(
                f"{type(self).__name__} wants each position 0 .. {n - 1} once: got {n} rows, {distinct} distinct "
                f"positions from {int(positions[0])} to {int(positions[-1])}."
            )
        return positions, {name: _joined(getattr(self, name)).cpu()[order] for name in self.columns}

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Gather the states; a process without images joins in with empty ones of the right shape and type."""
        names = ("positions", *self.columns)
        own = {
            name: (getattr(self, name)[0].shape[1:], getattr(self, name)[0].dtype) for name in names if self.positions
        }
        everyone: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(everyone, own, group=process_group)
        filled = next((shapes for shapes in everyone if shapes), None)
        if filled is None:
            return
        if not self.positions:
            for name, (shape, dtype) in filled.items():
                setattr(self, name, [torch.empty((0, *shape), dtype=dtype, device=self.device)])
        super()._sync_dist(dist_sync_fn, process_group)


class PerImageMetric(PerImageRows):
    """A score of images.

    To add a metric: name its `columns`, and implement `update`, `compute`, `compare`, `prepare` and `describe`; if it
    looks at features of a network, it is a `FeatureMetric`. After the last update call `gather` on every process: from
    then on `compute`, `rows` and `compare` are local. Without, `compute` is called on every process, and gathers.
    """

    minimum: int = 1
    """Of images."""
    needs_dense: ClassVar[bool] = False
    """Whether `update` wants the dense model's images."""
    extractor: FeatureExtractor | None = None
    """The network whose features of the images it uses. Metrics may share one."""
    tolerance: float | None = None
    """How much worse than the dense model's the score may be, relative, for the verdict; None gives none."""

    @abstractmethod
    def update(
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        positions: Tensor | Sequence[int],
        features: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Add images.

        Args:
            images: uint8 [b, 3, h, w].
            prompts: [b].
            positions: [b], places in the draw.
            features: of the images by `extractor`, where somebody has them already.
            dense: the dense model's images, uint8 [b, 3, h, w]; None means that these are they.
        """

    @abstractmethod
    def prepare(self, device: torch.device | str) -> None:
        """Load the weights on `device` and keep the states there. Raises InputError when they cannot be had."""

    @abstractmethod
    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Differences to a dense model's rows on the same prompts and noise, with 95 % intervals over images."""

    def remarks(self, scores: Mapping[str, float]) -> list[str]:
        """What a reader should know of these scores, which `compute` gave: one sentence or two each."""
        return []

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """Names of what `compute` and `compare` give, without the ends and errors of intervals."""
        return [self.name], [f"{self.name}_diff"]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able facts that the score depends on, for fingerprints; needs no loaded weights."""

    def _paired(self, dense_rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Own and dense rows of the same images.

        Raises:
            InputError: another number of images or another width of rows.
        """
        own, dense = self.rows(), self._checked(dense_rows)
        for name in self.columns:
            if own[name].shape != dense[name].shape:
                raise InputError(
                    f"{type(self).__name__} cannot pair {name} {list(own[name].shape)} with the dense record's "
                    f"{list(dense[name].shape)}: compare runs over the same prompts and metric."
                )
        return own, dense


def share_extractors(metrics: Sequence[PerImageMetric]) -> dict[str, FeatureExtractor]:
    """Let metrics whose extractors give the same features use one of them.

    Returns:
        The extractors that are left, by key.
    """
    shared: dict[str, FeatureExtractor] = {}
    for metric in metrics:
        if metric.extractor is not None:
            metric.extractor = shared.setdefault(metric.extractor.key, metric.extractor)
    return shared


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    """A cat state as one tensor: a list before the processes are gathered, a tensor afterwards."""
    return state if isinstance(state, Tensor) else torch.cat(state)
