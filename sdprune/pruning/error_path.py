"""Which units lose how many weights, so that the sum of their errors is as small as it can be."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sdprune.pruning.selection import rational

_STEPS = 200
"""Sparsities at which errors are compared, up to the highest level, unless a unit has steps of its own."""
_TINY, _HUGE = 1e-12, 1e12
"""Errors beyond are taken for these: logarithms of 0 and of infinity have no slope."""


@dataclass(frozen=True)
class Unit:
    """Weights that are pruned together, and the error of pruning them alone.

    Args:
        group: what it is counted with, such as its component.
        size: how many weights it has.
        levels: sparsities that were measured, ascending.
        errors: at each of them.
        steps: at how many equal steps up to the highest level errors are compared.
    """

    group: Hashable
    size: int
    levels: Sequence[float]
    errors: Sequence[float]
    steps: int = _STEPS

    @property
    def most(self) -> int:
        """How many weights it may lose: what is beyond the highest level is not known."""
        return math.ceil(self.size * rational(self.levels[-1]))

    def error(self, lost: int) -> float:
        """The error when it loses so many weights."""
        return float(np.interp(lost / self.most * _STEPS, np.arange(_STEPS + 1), self.curve()))

    def curve(self) -> np.ndarray:
        """The error at equal steps up to the highest level: a power law between neighbouring levels, and below
        the lowest one as above it."""
        x = np.log(self.levels)
        y = np.log(np.clip(np.nan_to_num(self.errors, nan=_HUGE, posinf=_HUGE), _TINY, _HUGE))
        y = np.maximum.accumulate(y)  # more zeros do not lose less, but for noise
        grid = np.log(np.arange(1, self.steps + 1) / self.steps) + x[-1]
        if len(x) == 1:  # in proportion: nothing else is known
            return np.concatenate([[0.0], np.exp(y + grid - x[-1])])
        part = np.clip(np.searchsorted(x, grid) - 1, 0, len(x) - 2)
        slope = np.diff(y) / np.diff(x)
        return np.concatenate([[0.0], np.exp(np.minimum(y[part] + slope[part] * (grid - x[part]), np.log(_HUGE)))])


class _Step(NamedTuple):
    slope: float
    """Error by weight: steps are taken in this order."""
    unit: int
    end: int
    weights: int
    error: float


class ErrorPath:
    """From no zeros to the most that were measured, along the least sum of errors: at any number of zeros, one
    multiplier for all units (Everett 1963), on the lower convex hulls of their errors.

    Args:
        units: in any order; of steps that cost the same the earlier unit's comes first.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self._steps = sorted(step for number, unit in enumerate(units) for step in _steps(number, unit))

    @property
    def most(self) -> int:
        """How many weights all units may lose."""
        return sum(unit.most for unit in self.units)

    def counts(self, total: int) -> list[int]:
        """How many weights each unit loses, `total` together; the last step is taken in part."""
        counts, left = [0] * len(self.units), total
        for step in self._steps:
            taken = min(step.weights, left)
            counts[step.unit] += taken
            left -= taken
        return counts

    def error(self, total: int) -> float:
        """The sum of the units' errors when they lose `total` weights together."""
        error, left = 0.0, total
        for step in self._steps:
            if not left:
                break
            taken = min(step.weights, left)
            error += step.error * (taken / step.weights if step.weights else 1)
            left -= taken
        return error

    def within(self, error: float) -> int:
        """How many weights all units may lose at a sum of errors that is no larger."""
        lost, left = 0, error
        for step in self._steps:
            if step.error > left:
                return lost + int(step.weights * left / step.error)
            lost, left = lost + step.weights, left - step.error
        return lost

    def groups(self, total: int) -> dict[Hashable, int]:
        """How many weights each group loses."""
        found: dict[Hashable, int] = {}
        for unit, lost in zip(self.units, self.counts(total), strict=True):
            found[unit.group] = found.get(unit.group, 0) + lost
        return found


def _steps(number: int, unit: Unit) -> list[_Step]:
    """The edges of the lower convex hull of a unit's errors."""
    curve, size = unit.curve(), unit.most
    return [
        _Step(
            float(curve[b] - curve[a]) / ((b - a) * size), number, b, size * b // unit.steps - size * a // unit.steps,
            float(curve[b] - curve[a]),
        )
        for a, b in pairwise(_hull(curve))
    ]  # fmt: skip


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
