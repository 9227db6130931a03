"""Less sparsity where pruning changes the output more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import List, get_args

import numpy as np

from sdprune.errors import InputError, as_share, unknown
from sdprune.pruning.allocation.base import Allocation, Norms, Share
from sdprune.pruning.selection import count, rational
from sdprune.pruning.statistics.pruned_error import Probe, Unit
from sdprune.pruning.targets import Target, by_block

_STEPS = 200
"""Sparsities at which errors are compared, up to the highest level."""
_TINY, _HUGE = 1e-12, 1e12
"""Errors beyond are taken for these: logarithms of 0 and of infinity have no slope."""


class Sensitivity(Allocation):
    """Share the sparsity out by measurement: the sum of the units' errors becomes as small as it can be.

    Each layer, or each block, is pruned alone to a few sparsities, by the specification's criterion. The error that
    this makes in the component's output (see `PrunedError`) is interpolated between these sparsities, in logarithms of
    both, and errors of several units are taken to add up. The chosen sparsities have the smallest sum of errors at the
    overall sparsity: one multiplier (Everett 1963) on the lower convex hulls of the errors. None exceeds the highest
    level, since what is not measured is not known: an overall sparsity from there on is uniform.

    Args:
        unit: layer or block: what is pruned alone, and gets a sparsity of its own.
        levels: sparsities that are measured, in (0, 1), ascending.
        samples: how many calibration prompts the error is measured on, the first ones.
        steps: at how many denoising steps.
    """

    statistics = frozenset({"pruned_error"})

    def __init__(
        self, unit: Unit = "layer", levels: List[float] = [0.3, 0.5, 0.7, 0.85, 0.95],  # noqa: B006 (not changed)
        samples: int = 8, steps: int = 3,
    ) -> None:  # fmt: skip
        if unit not in get_args(Unit):
            raise unknown("unit", unit, get_args(Unit))
        shares = [as_share("levels", level) for level in levels]
        if len(shares) < 2 or shares != sorted(set(shares)) or not shares[0] > 0 or not shares[-1] < 1:
            raise InputError(f"levels is {levels}: give ascending shares between 0 and 1, as in [0.3, 0.7].")
        for name, value in (("samples", samples), ("steps", steps)):
            if value < 1:
                raise InputError(f"{name} is {value}: give 1 or more.")
        self.unit, self.levels, self.samples, self.steps = unit, shares, samples, steps
        self.probe = Probe(self.unit, tuple(self.levels), self.samples, self.steps)

    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> Mapping[str, Share]:  # noqa: D102
        units = units_of(targets, self.unit)
        if sparsity >= self.levels[-1]:
            return {target.name: sparsity for target in targets}
        sizes = [sum(target.weight.numel() for target in members) for members in units.values()]
        errors = [statistics["pruned_error"][members[0].name].tolist() for members in units.values()]
        most = [math.ceil(size * rational(self.levels[-1])) for size in sizes]
        counts = _least(most, [_curve(self.levels, error) for error in errors], count(sum(sizes), sparsity))
        shares = {name: Fraction(lost, size) for name, lost, size in zip(units, counts, sizes, strict=True)}
        return {target.name: shares[name] for name, members in units.items() for target in members}


def units_of(targets: Sequence[Target], unit: Unit) -> dict[str, list[Target]]:
    """The layers that are pruned together, by the name of the layer or the block."""
    return by_block(targets) if unit == "block" else {target.name: [target] for target in targets}


def _curve(levels: Sequence[float], errors: Sequence[float]) -> np.ndarray:
    """The error at _STEPS equal steps up to the highest level: a power law between neighbouring levels, and below the
    lowest one as above it."""
    x = np.log(levels)
    y = np.log(np.clip(np.nan_to_num(errors, nan=_HUGE, posinf=_HUGE), _TINY, _HUGE))
    y = np.maximum.accumulate(y)  # more zeros do not lose less, but for noise
    grid = np.log(np.arange(1, _STEPS + 1) / _STEPS) + x[-1]
    part = np.clip(np.searchsorted(x, grid) - 1, 0, len(x) - 2)
    slope = np.diff(y) / np.diff(x)
    return np.concatenate([[0.0], np.exp(np.minimum(y[part] + slope[part] * (grid - x[part]), np.log(_HUGE)))])


def _least(most: Sequence[int], curves: Sequence[np.ndarray], total: int) -> list[int]:
    """How many weights each unit loses, `total` together and none more than `most`, with the least sum of errors.

    Steps along the lower convex hulls are taken in the order of error by weight; the last one in part.
    """
    steps = []
    for number, (size, curve) in enumerate(zip(most, curves, strict=True)):
        hull = _hull(curve)
        for a, b in pairwise(hull):
            weights = size * b // _STEPS - size * a // _STEPS
            steps.append(((curve[b] - curve[a]) / ((b - a) * size), number, b, weights))
    counts, left = [0] * len(most), total
    for _, number, _, weights in sorted(steps):
        taken = min(weights, left)
        counts[number] += taken
        left -= taken
    return counts


def _hull(curve: np.ndarray) -> list[int]:
    """Places on the lower convex hull of a curve over 0, 1, 2, ..."""
    found: list[int] = []
    for place, value in enumerate(curve):
        while len(found) > 1:
            a, b = found[-2:]
            if (curve[b] - curve[a]) * (place - b) < (value - curve[b]) * (b - a):
                break
            found.pop()
        found.append(place)
    return found
