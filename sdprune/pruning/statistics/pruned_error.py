"""What a component loses when one layer or block of it alone is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sdprune.pruning.statistics.base import Statistic
from sdprune.pruning.timesteps import Timesteps

ProbedUnit = Literal["layer", "block"]
ReadAt = Literal["output", "prediction"]


@dataclass(frozen=True)
class Probe:
    """How `pruned_error` is measured.

    Args:
        unit: what is pruned by itself: each layer, or each block as a whole.
        levels: the sparsities that it is pruned to, ascending.
        samples: how many calibration prompts the error is a mean over, the first ones.
        steps: at how many denoising steps, in the middle of equal parts of the drawing.
        read_at: the component's own output, or what the denoiser predicts from it.
    """

    unit: ProbedUnit
    levels: tuple[float, ...]
    samples: int
    steps: int
    read_at: ReadAt = "output"


class PrunedError(Statistic):
    """`pruned_error`: how much an output changes when a unit alone is pruned: float64 [levels].

    For each sample it is the squared change over the squared output; then the mean over samples. The output is what
    the pipeline makes of the component: a denoiser's guided prediction on the latents of the dense model, or the
    embeddings of the prompts; or, read at the prediction, that of the dense denoiser from the embeddings that the
    pruned text encoder gives. Where blocks are the units, the layers of a block have the same numbers.
    """

    name = "pruned_error"

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:  # noqa: D102
        cls.require_axes(layer, stored, "levels")
        return stored
