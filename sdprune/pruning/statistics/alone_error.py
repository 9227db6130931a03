"""What a component loses when one layer or block of it alone is pruned."""

from __future__ import annotations

from torch import Tensor

from sdprune.pruning.statistics.base import Statistic
from sdprune.pruning.timesteps import Timesteps


class AloneError(Statistic):
    """`alone_error`: how much an output changes when a unit alone is pruned: float64 [levels].

    For each sample it is the squared change over the squared output; then the mean over samples. The output is what
    the pipeline makes of the component: a denoiser's guided prediction on the latents of the dense model, or the
    embeddings of the prompts; or, read at the prediction, that of the dense denoiser from the embeddings that the
    pruned text encoder gives. Where blocks are the units, the layers of a block have the same numbers.
    """

    name = "alone_error"

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:  # noqa: D102
        cls.require_axes(layer, stored, "levels")
        return stored
