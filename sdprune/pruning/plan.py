"""What every layer loses: how many weights, decided before scores are looked at, and then which."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial, reduce
from itertools import chain
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.allocation.base import Share
from sdprune.pruning.criteria.base import Ranking, Reconstruction
from sdprune.pruning.selection import (
    CHUNK,
    Layer,
    apportion,
    column_blocks,
    count,
    rational,
    select,
    select_column_blocks,
    select_pattern,
    select_rows,
    select_topk,
    select_up_to,
    split,
)
from sdprune.pruning.spec import PruneSpec
from sdprune.pruning.statistics import statistic_class
from sdprune.pruning.targets import Target

Statistics = Mapping[str, Mapping[str, Tensor]]  # statistic name -> layer name -> tensor
Worked = Tuple[Target, Tensor, Optional[Tensor], Dict[str, Any]]  # target, mask, new weight, notes


class Plan:
    """How many weights every group of layers loses: everything that is decided before scores are looked at.

    Args:
        targets: all layers of the component that are pruned, dense.
        spec: what to prune and how.
        statistics: as in `apply`; looked at when a layer is worked on.
        dense_statistics: as in `apply`; read at once.
    """

    def __init__(
        self, targets: Sequence[Target], spec: PruneSpec, statistics: Statistics, dense_statistics: Statistics
    ) -> None:
        self.spec, self.statistics = spec, statistics
        if spec.dense:
            return
        _require(targets, spec.allocation, dense_statistics)
        norms = {
            name: {
                target.name: statistic_class(name).read(
                    target.name, dense_statistics[name][target.name], spec.timesteps
                )
                for target in targets
            }
            for name in spec.allocation.statistics
        }
        self.sparsities: Mapping[str, Share]
        if spec.mode == "original":
            criterion = type(spec.criterion).__name__
            self.sparsities = spec.allocation.original(targets, spec.nominal, norms, criterion)
            return
        self.sparsities = spec.allocation.sparsities(targets, spec.nominal, norms)
        groups = self.groups(targets)
        self.ranks = dict(zip(groups, self._ranks(list(groups.values())), strict=True))

    def work(self, targets: Sequence[Target]) -> Iterator[Worked]:
        """Masks, and new weights where there are any, of whole groups of targets."""
        if self.spec.dense:
            return ((target, torch.zeros(target.shape, dtype=torch.bool), None, {}) for target in targets)
        _require(targets, self.spec.criterion, self.statistics)
        if self.spec.mode == "exact" and self.spec.granularity in ("layer", "module_block", "component"):
            groups = self.groups(targets)
            return chain.from_iterable(self._together(group, *self.ranks[key]) for key, group in groups.items())
        return (self._alone(target) for target in targets)

    def groups(self, targets: Sequence[Target]) -> dict[str, list[Target]]:
        """See `groups_of`."""
        return groups_of(targets, self.spec)

    def _ranks(self, groups: list[list[Target]]) -> list[Tuple[int, int]]:
        """The ranks (first, one past last) that each group loses."""
        spec, sparsities = self.spec, self.sparsities
        sizes = [sum(target.weight.numel() for target in group) for group in groups]
        if spec.band is not None:
            return [(count(size, spec.band[0]), count(size, spec.band[1])) for size in sizes]
        if spec.allocation.explicit:
            return [(0, self._count(group)) for group in groups]
        quotas = [sum((t.weight.numel() * rational(sparsities[t.name]) for t in group), Fraction()) for group in groups]
        total, shared = count(sum(sizes), spec.nominal), sum(quotas, Fraction())
        if abs(shared - total) >= 1:
            raise InputError(
                f"Allocation {type(spec.allocation).__name__} prunes {float(shared):.1f} weights where sparsity "
                f"{spec.nominal} means {total}: keep the mean, or set `explicit` in the class if that is meant."
            )
        return [(0, k) for k in apportion(quotas, total)]

    def _count(self, group: list[Target]) -> int:
        """What layers with explicit sparsities lose together."""
        sizes: Dict[float, int] = {}  # by sparsity: a group of one sparsity loses count(size, sparsity) to the bit
        for target in group:
            share = float(self.sparsities[target.name])
            sizes[share] = sizes.get(share, 0) + target.weight.numel()
        return math.floor(sum(size * share for share, size in sizes.items()) + 0.5)

    def _together(self, group: list[Target], low: int, high: int) -> Iterator[Worked]:
        widest = reduce(torch.promote_types, (target.weight.dtype for target in group))
        layers = [
            Layer(
                target.name,
                target.shape,
                target.weight.device,
                [partial(self._score, target, widest, rows) for rows in self._parts(target)],
            )
            for target in group
        ]
        selected = select(layers, low, high)
        for target in group:
            yield target, next(selected), None, {}

    def _alone(self, target: Target) -> Worked:
        """One layer, ranked in parts of itself or as the published code does."""
        criterion = self.spec.criterion
        if isinstance(criterion, Reconstruction):
            return self._reconstruct(target, criterion)
        scores = self._score(target, target.weight.dtype, slice(None))
        if self.spec.pattern:
            order = target.channels_last
            mask = torch.empty(target.shape, dtype=torch.bool, device=scores.device)
            mask[:, order] = self._pattern(target, scores[:, order], *self.spec.pattern)
        elif self.spec.mode == "original":
            mask = self._original(target, scores)
        else:
            mask = self._in_parts(target, scores)
        return target, mask, None, {}

    def _in_parts(self, target: Target, scores: Tensor) -> Tensor:
        rows, columns = target.shape
        by_row = self.spec.granularity == "row"
        widths = [columns] if by_row else column_blocks(columns, self.spec.block_width)
        sizes = widths * rows if by_row else [rows * width for width in widths]
        lows, highs = [0] * len(sizes), split(self.ranks[target.name][1], sizes)
        if self.spec.band is not None:
            lows, highs = ([count(size, share) for size in sizes] for share in self.spec.band)
        if by_row:
            return select_rows(target.name, scores, lows, highs)
        return select_column_blocks(target.name, scores, self.spec.block_width, lows, highs)

    def _original(self, target: Target, scores: Tensor) -> Tensor:
        """Magnitude: one threshold a layer, ties included; Wanda: so many of every row."""
        share = self.sparsities[target.name]
        if self.spec.granularity == "row":
            return select_rows(target.name, scores, [0] * len(scores), [int(scores.shape[1] * share)] * len(scores))
        # Plain magnitude indexes with k - 1, so that k = 0 wraps round to the last; with OWL it is k.
        rank = int(scores.numel() * share) - (0 if self.spec.allocation.statistics else 1)
        return select_up_to(target.name, scores, rank)

    def _reconstruct(self, target: Target, criterion: Reconstruction) -> Worked:
        rows = target.shape[0]
        order = target.channels_last if self.spec.pattern else slice(None)
        widths = _stretches(target, self.spec)
        counts = {}
        if not self.spec.pattern and self.spec.mode == "exact":
            k = split(self.ranks[target.name][1], [rows * width for width in widths])
            counts = dict(zip(_starts(widths), k, strict=True))
        mask = torch.empty(target.shape, dtype=torch.bool, device=target.weight.device)
        weight = torch.empty_like(target.matrix)
        notes: Dict[str, Any] = {}
        own = {name: self._read(name, target) for name in criterion.statistics}
        size = rows // target.groups
        for group in range(target.groups):
            part = slice(group * size, (group + 1) * size)
            shares = {start: split(k, [size] * target.groups)[group] for start, k in counts.items()}
            pick = partial(self._pick, target, shares)
            hessian = {name: value[group][order][:, order] for name, value in own.items()}  # a view without a pattern
            mask_part, weight_part, told = criterion.reconstruct(
                target.matrix[part][:, order], hessian, pick, widths, original=self.spec.mode == "original"
            )
            mask[part, order], weight[part, order] = mask_part, weight_part.to(weight.dtype)
            notes |= {name: max(value, notes.get(name, value)) for name, value in told.items()}
        return target, mask, weight if mask.any() else None, notes  # nothing pruned, nothing to make up for

    def _pick(self, target: Target, counts: Mapping[int, int], scores: Tensor, start: int, stop: int) -> Tensor:
        if self.spec.pattern:
            n, m = self.spec.pattern
            if stop - start < m:  # a remainder stays dense
                return torch.zeros_like(scores, dtype=torch.bool)
            return self._lowest_of_group(target.name, scores, n)
        if self.spec.mode == "original":
            return select_up_to(target.name, scores, int(scores.numel() * self.sparsities[target.name]))
        return select_column_blocks(target.name, scores, stop - start, [0], [counts[start]])

    def _pattern(self, target: Target, scores: Tensor, n: int, m: int) -> Tensor:
        """The N lowest of every M neighbouring channels; a remainder stays dense. Scores in channels-last order."""
        by_position = scores.unflatten(1, (-1, target.channels))
        whole = target.channels // m * m
        mask = torch.zeros(by_position.shape, dtype=torch.bool, device=scores.device)
        if whole:
            groups = by_position[..., :whole].unflatten(2, (-1, m))
            mask[..., :whole] = self._lowest_of_group(target.name, groups, n).flatten(2)
        return mask.flatten(1)

    @property
    def _lowest_of_group(self) -> Callable[[str, Tensor, int], Tensor]:
        return select_pattern if self.spec.mode == "exact" else select_topk

    def _read(self, name: str, target: Target) -> Tensor:
        return statistic_class(name).read(target.name, self.statistics[name][target.name], self.spec.timesteps)

    def _parts(self, target: Target) -> list[slice]:
        """The rows that are scored at a time."""
        rows, columns = target.shape
        rowwise = isinstance(self.spec.criterion, Ranking) and self.spec.criterion.rowwise
        step = max(1, CHUNK // columns) if rowwise else rows
        return [slice(start, start + step) for start in range(0, rows, step)]

    def _score(self, target: Target, dtype: torch.dtype, rows: slice) -> Tensor:
        """The criterion's scores; ranked beside layers of a wider dtype they are widened, which keeps their order."""
        criterion = self.spec.criterion
        assert isinstance(criterion, Ranking)
        own = {
            name: target.by_row(self._read(name, target).to(target.weight.device), rows)
            for name in criterion.statistics
        }
        weight = target.rows(rows)
        scores = criterion.score(weight, own)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"{type(criterion).__name__} scores layer {target.name!r} with {found}: `score` must return one of "
                f"the weight's shape {list(weight.shape)}, [rows, columns]."
            )
        return scores.to(torch.promote_types(scores.dtype, dtype)) if scores.is_floating_point() else scores


def groups_of(targets: Sequence[Target], spec: PruneSpec) -> dict[str, list[Target]]:
    """The targets that are ranked together; what is ranked in parts of a layer comes layer by layer."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        key = {"component": "", "module_block": target.block}.get(str(spec.granularity), target.name)
        groups.setdefault(key, []).append(target)
    return groups


def _stretches(target: Target, spec: PruneSpec) -> list[int]:
    """Widths of the runs of columns that are chosen from together."""
    columns = target.shape[1]
    if not spec.pattern:
        return column_blocks(columns, spec.block_width)
    m = spec.pattern[1]
    return column_blocks(target.channels, m) * (columns // target.channels)


def _starts(widths: list[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


def _require(targets: Sequence[Target], part: Any, statistics: Statistics) -> None:
    for statistic in sorted(part.statistics):
        for target in targets:
            if target.name not in statistics.get(statistic, {}):
                raise InputError(
                    f"{type(part).__name__} needs the statistic {statistic} of layer {target.name!r}, which was "
                    "not gathered: calibrate first, or exclude the layer if calibration never runs it."
                )
