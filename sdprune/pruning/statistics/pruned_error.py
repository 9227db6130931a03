"""What a component loses when one layer or block of it is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdprune.pruning.statistics.base import Statistic
from sdprune.pruning.timesteps import Timesteps

ProbedUnit = Literal["layer", "block"]
ReadAt = Literal["output", "prediction"]
HARMLESS = 0.03
"""The sum of errors alone in the pruned model that `pruned_error` is measured in."""


@dataclass(frozen=True)
class Probe:
    """How `pruned_error` is measured.

    Args:
        unit: what is pruned by itself: each layer, or each block as a whole.
        levels: the sparsities that it is pruned to, ascending.
        samples: how many calibration prompts the error is a mean over, the first ones.
        steps: at how many denoising steps, in the middle of equal parts of the drawing; each prompt counts at one of
            them, in turn.
        read_at: the component's own output, or what the denoiser predicts from it.
    """

    unit: ProbedUnit
    levels: tuple[float, ...]
    samples: int
    steps: int
    read_at: ReadAt = "output"


class PrunedError(Statistic):
    """`pruned_error`: how much an output changes when a unit is pruned, beside others: float64 [levels].

    Units that stand in for each other lose little alone, and much together. In a model that is pruned so far that the
    errors alone add up to HARMLESS, what a unit adds to the error is measured by making it dense. Where that is more
    than what it loses alone at the same sparsity, its `alone_error` is multiplied by the root of the ratio: this is the
    geometric mean of the unit's error when no other is pruned and when all are.
    """

    name = "pruned_error"

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:  # noqa: D102
        cls.require_axes(layer, stored, "levels")
        return stored
