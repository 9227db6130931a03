"""Pruning in one page: allocate, score, select, zero, report."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain
from typing import Any, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.selection import (
    CHUNK,
    Layer,
    apportion,
    column_blocks,
    count,
    select,
    select_column_blocks,
    select_rows,
    split,
)
from sdprune.pruning.spec import PruneSpec
from sdprune.pruning.targets import Target, find_targets

Statistics = Mapping[str, Mapping[str, Tensor]]  # statistic name -> layer name -> tensor


@dataclass
class LayerReport:
    """What happened to one layer: counts of its weights, of those pruned, and of the zeros it has now."""

    name: str
    kind: str
    block: str
    weights: int
    pruned: int
    zeros: int


@dataclass
class PruneReport:
    """What happened to a component.

    `mask_hash` is equal exactly when every mask is, whatever process or granularity produced it.
    """

    spec: dict[str, Any]
    nominal: float
    layers: List[LayerReport] = field(default_factory=list)
    mask_hash: str = ""

    @property
    def weights(self) -> int:
        """Targeted weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def pruned(self) -> int:
        """Weights that a mask covers."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Zeros among the targeted weights, pruned or there before."""
        return sum(layer.zeros for layer in self.layers)


@torch.no_grad()
def prune(component: nn.Module, spec: PruneSpec, statistics: Optional[Statistics] = None) -> PruneReport:
    """Prune a component in place: pruned weights become 0, all others keep their bits.

    Args:
        component: a text encoder, a U-Net or any other module, dense.
        spec: what to prune and how; a sparsity of 0 touches nothing.
        statistics: of the dense component's layer inputs, as the criterion and the allocation name them.

    Raises:
        InputError: for patterns that match no layer, missing statistics and NaN scores, naming the layer. At NaN scores
            earlier layers may have been pruned already.
    """
    targets = find_targets(component, spec.layers, spec.include, spec.exclude)
    reports: dict[str, LayerReport] = {}
    digests: dict[str, bytes] = {}
    for target, mask in masks(targets, spec, statistics):
        pruned = 0 if spec.dense else _zero(target, mask)
        weights = target.weight.numel()
        zeros = weights - int(target.weight.count_nonzero())
        reports[target.name] = LayerReport(target.name, target.kind, target.block, weights, pruned, zeros)
        digests[target.name] = hashlib.sha256(np.packbits(mask.cpu().numpy()).data).digest()
        del mask  # before the next one is made
    in_order = b"".join(digests[target.name] for target in targets)
    layers = [reports[target.name] for target in targets]
    return PruneReport(spec.describe(), spec.nominal, layers, hashlib.sha256(in_order).hexdigest())


def masks(
    targets: Sequence[Target], spec: PruneSpec, statistics: Optional[Statistics] = None
) -> Iterator[Tuple[Target, Tensor]]:
    """Each target with its mask, bool [rows, columns], True = prune, group by group.

    A target's weight may be changed as soon as its mask is out. Beside the current mask no more than one layer's scores
    are held at a time, of a rowwise criterion no more than a few rows'.
    """
    if spec.dense:
        return ((target, torch.zeros(target.shape, dtype=torch.bool)) for target in targets)
    statistics = statistics or {}
    _check_statistics(targets, spec, statistics)
    groups = _groups(targets, spec.granularity)
    ranks = _ranks(groups, spec, spec.allocation.sparsities(targets, spec.sparsity, statistics))
    pick = _pick_within if spec.granularity in ("row", "column_block") else _pick_together
    return chain.from_iterable(
        pick(group, low, high, spec, statistics) for group, (low, high) in zip(groups, ranks, strict=True)
    )


def _groups(targets: Sequence[Target], granularity: str) -> list[list[Target]]:
    """The targets that are ranked together; what is ranked in parts of a layer comes layer by layer."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        key = {"component": "", "module_block": target.block}.get(granularity, target.name)
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _ranks(groups: list[list[Target]], spec: PruneSpec, sparsities: Mapping[str, float]) -> list[Tuple[int, int]]:
    """The ranks (first, one past last) that each group loses."""
    sizes = [sum(target.weight.numel() for target in group) for group in groups]
    if spec.band is not None:
        return [(count(size, spec.band[0]), count(size, spec.band[1])) for size in sizes]
    if all(sparsity == spec.sparsity for sparsity in sparsities.values()):
        return [(0, count(size, spec.sparsity)) for size in sizes]
    # Unequal sparsities: one count for the component, shared among the groups, so that rounding does not add up.
    unit = 1 << 52
    asked = [sum(t.weight.numel() * round(sparsities[t.name] * unit) for t in group) for group in groups]
    return [(0, k) for k in apportion(asked, unit)]


def _pick_together(
    group: list[Target], low: int, high: int, spec: PruneSpec, statistics: Statistics
) -> Iterator[Tuple[Target, Tensor]]:
    widest = reduce(torch.promote_types, (target.weight.dtype for target in group))
    layers = [
        Layer(
            target.name,
            target.shape,
            target.weight.device,
            [partial(_score, target, spec, statistics, widest, rows) for rows in _parts(target, spec)],
        )
        for target in group
    ]
    selected = select(layers, low, high)
    for target in group:
        yield target, next(selected)


def _pick_within(
    group: list[Target], low: int, high: int, spec: PruneSpec, statistics: Statistics
) -> Iterator[Tuple[Target, Tensor]]:
    for target in group:
        rows, columns = target.shape
        widths = [columns] if spec.granularity == "row" else column_blocks(columns, spec.block_width)
        sizes = widths * rows if spec.granularity == "row" else [rows * width for width in widths]
        lows, highs = [0] * len(sizes), split(high, sizes)
        if spec.band is not None:
            lows, highs = ([count(size, share) for size in sizes] for share in spec.band)
        scores = _score(target, spec, statistics, target.weight.dtype, slice(None))
        if spec.granularity == "row":
            yield target, select_rows(target.name, scores, lows, highs)
        else:
            yield target, select_column_blocks(target.name, scores, spec.block_width, lows, highs)


def _parts(target: Target, spec: PruneSpec) -> list[slice]:
    """The rows that are scored at a time."""
    rows, columns = target.shape
    step = max(1, CHUNK // columns) if spec.criterion.rowwise else rows
    return [slice(start, start + step) for start in range(0, rows, step)]


def _score(target: Target, spec: PruneSpec, statistics: Statistics, dtype: torch.dtype, rows: slice) -> Tensor:
    """The criterion's scores; ranked beside layers of a wider dtype they are widened, which keeps their order."""
    own = {name: statistics[name][target.name] for name in spec.criterion.statistics}
    scores = spec.criterion.score(target.weight.detach()[rows].flatten(1), own)
    return scores.to(torch.promote_types(scores.dtype, dtype)) if scores.is_floating_point() else scores


def _zero(target: Target, mask: Tensor) -> int:
    weight = target.weight
    weight.masked_fill_(mask.view(weight.shape), 0)
    return int(mask.count_nonzero())


def _check_statistics(targets: Sequence[Target], spec: PruneSpec, statistics: Statistics) -> None:
    for part in (spec.criterion, spec.allocation):
        for statistic in sorted(part.statistics):
            for target in targets:
                if target.name not in statistics.get(statistic, {}):
                    raise InputError(
                        f"{type(part).__name__} needs the statistic {statistic} of layer {target.name!r}, which was "
                        "not gathered: calibrate first, or exclude the layer if calibration never runs it."
                    )
