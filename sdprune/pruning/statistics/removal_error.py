"""What a component loses when one module alone loses units, and what that saves."""

from __future__ import annotations

from torch import Tensor

from sdprune.pruning.statistics.base import Statistic
from sdprune.pruning.timesteps import Timesteps


class RemovalError(Statistic):
    """`removal_error`: how much an output changes when one module alone loses units: float64 [levels, 3].

    In each row: the share of its units that is removed, ascending; the share of the component's FLOPs that this saves;
    and the error, as in `PrunedError`. The layer that reads the units is fitted to its dense outputs if it will be.
    The statistic is that of this layer.
    """

    name = "removal_error"

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:  # noqa: D102
        cls.require_axes(layer, stored, "levels", "numbers")
        return stored
