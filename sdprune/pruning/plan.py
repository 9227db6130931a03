"""What every layer loses: how many weights, decided before scores are looked at, and then which."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial, reduce
from itertools import accumulate
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.allocation.base import Share
from sdprune.pruning.criteria.base import Ranking, Reconstruction
from sdprune.pruning.granularity.base import ColumnWise, Granularity, Quota, WithinLayer
from sdprune.pruning.granularity.original import as_published
from sdprune.pruning.selection import CHUNK, Layer, apportion, count, rational, split
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
        self.spec, self.statistics, self.granularity = spec, statistics, spec.ranked
        if spec.dense:
            return
        _require(targets, spec.allocation, dense_statistics)
        norms = {
            name: {target.name: self._read(dense_statistics, name, target) for target in targets}
            for name in spec.allocation.statistics
        }
        groups = groups_of(targets, self.granularity)
        counts = [0] * len(groups)  # neither a band nor the published counting has any
        if spec.mode == "original":
            criterion = type(spec.criterion).__name__
            shares = spec.allocation.original(targets, spec.nominal, norms, criterion)
            self.granularity = as_published(spec.ranked, shares, bool(spec.allocation.statistics))
        else:
            sparsities = spec.allocation.sparsities(targets, spec.nominal, norms)
            counts = counts if spec.band else _counts(list(groups.values()), spec, sparsities)
        self.quotas = {key: Quota(k, spec.band) for key, k in zip(groups, counts, strict=True)}

    def work(self, targets: Sequence[Target]) -> Iterator[Worked]:
        """Masks, and new weights where there are any, of whole groups of targets."""
        if self.spec.dense:
            yield from ((target, torch.zeros(target.shape, dtype=torch.bool), None, {}) for target in targets)
            return
        _require(targets, self.spec.criterion, self.statistics)
        work = self._reconstruct if isinstance(self.spec.criterion, Reconstruction) else self._rank
        for key, group in groups_of(targets, self.granularity).items():
            yield from work(group, self.quotas[key])

    def _rank(self, group: list[Target], quota: Quota) -> Iterator[Worked]:
        widest = reduce(torch.promote_types, (target.weight.dtype for target in group))
        layers = [Layer(t, [partial(self._score, t, widest, rows) for rows in self._parts(t)]) for t in group]
        masks = self.granularity.masks(layers, quota)
        for target in group:
            mask = next(masks)
            _check_shape(self.granularity, "mask", mask, target.name, target.shape)
            yield target, mask, None, {}
            del mask  # before the next one is made

    def _reconstruct(self, group: list[Target], quota: Quota) -> Iterator[Worked]:
        """One layer, stretch after stretch of its columns; of a grouped convolution group by group."""
        (target,), granularity, criterion = group, self.granularity, self.spec.criterion
        assert isinstance(granularity, ColumnWise)
        assert isinstance(criterion, Reconstruction)
        order, widths, size = granularity.order(target), granularity.widths(target), target.shape[0] // target.groups
        _, counts = quota.ranks([target.shape[0] * width for width in widths])
        shares = dict(
            zip(accumulate(widths, initial=0), (split(k, [size] * target.groups) for k in counts), strict=False)
        )
        mask = torch.empty(target.shape, dtype=torch.bool, device=target.weight.device)
        weight = torch.empty_like(target.matrix)
        notes: Dict[str, Any] = {}
        statistics = {name: self._read(self.statistics, name, target) for name in criterion.statistics}
        for number in range(target.groups):
            part = slice(number * size, (number + 1) * size)

            def pick(scores: Tensor, start: int, stop: int, number: int = number) -> Tensor:
                return granularity.pick(target.name, scores, shares[start][number])

            own = {name: value[number][order][:, order] for name, value in statistics.items()}  # mostly a view
            mask_part, weight_part, remarks = criterion.reconstruct(
                target.matrix[part][:, order], own, pick, widths, original=self.spec.mode == "original"
            )
            mask[part, order], weight[part, order] = mask_part, weight_part.to(weight.dtype)
            notes |= {name: max(value, notes.get(name, value)) for name, value in remarks.items()}
        yield target, mask, weight if mask.any() else None, notes  # nothing pruned, nothing to make up for

    def _read(self, statistics: Statistics, name: str, target: Target) -> Tensor:
        return statistic_class(name).read(target.name, statistics[name][target.name], self.spec.timesteps)

    def _parts(self, target: Target) -> list[slice]:
        """The rows that are scored at a time."""
        rows, columns = target.shape
        rowwise = isinstance(self.spec.criterion, Ranking) and self.spec.criterion.rowwise
        step = max(1, CHUNK // columns) if rowwise and not isinstance(self.granularity, WithinLayer) else rows
        return [slice(start, start + step) for start in range(0, rows, step)]

    def _score(self, target: Target, dtype: torch.dtype, rows: slice) -> Tensor:
        """The criterion's scores; ranked beside layers of a wider dtype they are widened, which keeps their order."""
        criterion = self.spec.criterion
        assert isinstance(criterion, Ranking)
        own = {name: self._read(self.statistics, name, target) for name in criterion.statistics}
        own = {name: target.by_row(value.to(target.weight.device), rows) for name, value in own.items()}
        weight = target.rows(rows)
        scores = criterion.score(weight, own)
        _check_shape(criterion, "score", scores, target.name, weight.shape)
        return scores.to(torch.promote_types(scores.dtype, dtype)) if scores.is_floating_point() else scores


def groups_of(targets: Sequence[Target], granularity: Granularity) -> dict[str, list[Target]]:
    """The layers that are ranked together, by group."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(granularity.group(target), []).append(target)
    return groups


def _counts(groups: list[list[Target]], spec: PruneSpec, sparsities: Mapping[str, Share]) -> list[int]:
    """How many weights each group loses."""
    if spec.allocation.explicit:
        return [_explicit_count(group, sparsities) for group in groups]
    quotas = [sum((t.weight.numel() * rational(sparsities[t.name]) for t in group), Fraction()) for group in groups]
    size = sum(target.weight.numel() for group in groups for target in group)
    total, shared = count(size, spec.nominal), sum(quotas, Fraction())
    if abs(shared - total) >= 1:
        raise InputError(
            f"Allocation {type(spec.allocation).__name__} prunes {float(shared):.1f} weights where sparsity "
            f"{spec.nominal} means {total}: keep the mean, or set `explicit` in the class if that is meant."
        )
    return apportion(quotas, total)


def _explicit_count(group: list[Target], sparsities: Mapping[str, Share]) -> int:
    """What layers with explicit sparsities lose together."""
    sizes: Dict[float, int] = {}  # by sparsity: a group of one sparsity loses count(size, sparsity) to the bit
    for target in group:
        share = float(sparsities[target.name])
        sizes[share] = sizes.get(share, 0) + target.weight.numel()
    return math.floor(sum(size * share for share, size in sizes.items()) + 0.5)


def _check_shape(part: Any, function: str, found: Any, layer: str, shape: Sequence[int]) -> None:
    if not isinstance(found, Tensor) or found.shape != tuple(shape):
        shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"{type(part).__name__} {function}s layer {layer!r} with {shown}: `{function}` must return one of the "
            f"weight's shape {list(shape)}, [rows, columns]."
        )


def _require(targets: Sequence[Target], part: Any, statistics: Statistics) -> None:
    for statistic in sorted(part.statistics):
        for target in targets:
            if target.name not in statistics.get(statistic, {}):
                raise InputError(
                    f"{type(part).__name__} needs the statistic {statistic} of layer {target.name!r}, which was "
                    "not gathered: calibrate first, or exclude the layer if calibration never runs it."
                )
