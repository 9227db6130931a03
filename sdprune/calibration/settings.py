"""What of the calibration runs counts."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sdprune.errors import InputError, unknown

Latents = Literal["pruned", "dense"]


@dataclass(frozen=True)
class Calibration:
    """What of the calibration runs counts, and the memory they may take.

    Args:
        padding: whether a text encoder's padding tokens count, as they do in the published codes.
        unconditional: weight of what is predicted without prompts, in half of a batch or in a call; the rest has 1.
        empty_prompt: weight of the empty or negative prompt in the statistics of text encoders, beside the 1 of each
            prompt. Guided predictions depend on it as much as on the prompt; the published codes leave it out.
        hessian_gib: memory in GiB for the statistics gathered in one pass over the prompts; more make more passes.
        kept_gib: disk space in GiB, below $TMPDIR, where each process may keep what blocks give, so that several passes
            need one run of the pipeline. Where it is too little, every pass runs the pipeline.
        latents: what a denoiser sees in sequential order: `pruned` latents, which it draws itself while its blocks are
            pruned one after another, a run for each; or `dense` ones, which the dense model draws once.
    """

    padding: bool = True
    unconditional: float = 1.0
    empty_prompt: float = 0.0
    hessian_gib: float = 8.0
    kept_gib: float = 64.0
    latents: Latents = "pruned"

    def __post_init__(self) -> None:
        for name in ("unconditional", "empty_prompt"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: give a weight of 0 or more.")
        if self.empty_prompt and not self.padding:
            raise InputError(
                f"empty_prompt is {self.empty_prompt} and padding is false: an empty prompt is nothing but padding. "
                "Give one of the two."
            )
        if not 0 < self.hessian_gib < math.inf:
            raise InputError(f"hessian_gib is {self.hessian_gib}: give the memory in GiB, as in 8.")
        if not 0 <= self.kept_gib < math.inf:
            raise InputError(f"kept_gib is {self.kept_gib}: give the disk space in GiB, as in 64.")
        if self.latents not in get_args(Latents):
            raise unknown("latents", self.latents, get_args(Latents))

    @property
    def kept(self) -> int:
        """The disk space in bytes."""
        return int(self.kept_gib * 2**30)

    @property
    def memory(self) -> int:
        """The memory in bytes."""
        return int(self.hessian_gib * 2**30)
