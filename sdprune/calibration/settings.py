"""What of the calibration runs counts."""

import math
from dataclasses import dataclass

from sdprune.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """What of the calibration runs counts, and the memory they may take.

    Args:
        padding: whether a text encoder's padding tokens count, as they do in the published codes.
        unconditional: weight of the half of a guided batch that runs without its prompts; the other half has 1.
        hessian_gib: memory in GiB for the statistics gathered in one pass over the prompts; more make more passes.
    """

    padding: bool = True
    unconditional: float = 1.0
    hessian_gib: float = 8.0

    def __post_init__(self) -> None:
        if not 0 <= self.unconditional < math.inf:
            raise InputError(f"unconditional is {self.unconditional}: give a weight of 0 or more.")
        if not 0 < self.hessian_gib < math.inf:
            raise InputError(f"hessian_gib is {self.hessian_gib}: give the memory in GiB, as in 8.")

    @property
    def memory(self) -> int:
        """The memory in bytes."""
        return int(self.hessian_gib * 2**30)
