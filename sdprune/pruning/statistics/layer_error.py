"""What a component loses when one whole layer of it is dropped."""

from __future__ import annotations

from torch import Tensor

from sdprune.pruning.statistics.base import Statistic
from sdprune.pruning.timesteps import Timesteps


class LayerError(Statistic):
    """`layer_error`: how much an output changes when one layer alone is dropped: float64 [1], as in `PrunedError`.

    The statistic is that of the first Linear layer in it.
    """

    name = "layer_error"

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:  # noqa: D102
        cls.require_axes(layer, stored, "numbers")
        return stored
