"""How images are drawn, and what comes out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

from sdprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from the model.

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less is none.
        height: of the image in pixels; the model's own if not given.
        width: of the image in pixels; the model's own if not given.
        scheduler: a diffusers scheduler class to use instead of the model's own, e.g. DPMSolverMultistepScheduler.
    """

    option: ClassVar[str] = "--model.sampling.{}"
    """How the command line names a field, for errors."""
    steps: int = 50
    guidance: float = 7.5
    height: Optional[int] = None
    width: Optional[int] = None
    scheduler: Optional[str] = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}: give 1 or more.")
        if not math.isfinite(self.guidance):
            raise InputError(f"guidance is {self.guidance}: give a number, as in 7.5.")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise InputError(f"{name} is {value}: give a multiple of 8 pixels.")

    @property
    def size(self) -> tuple[Optional[int], Optional[int]]:
        """Height and width in pixels, None where the model's own is taken."""
        return self.height, self.width

    def describe(self) -> dict[str, Any]:
        """All of it, for fingerprints."""
        return asdict(self)


class Drawn(NamedTuple):
    """Images, or latents, of one batch."""

    images: Tensor
    """uint8 [b, 3, height, width] on the CPU; of latents that were not decoded [b, channels, h, w]."""
    finite: list[bool]
    """Whether each image came out of finite numbers; one that did not is black where they were not."""


def step_of(timesteps: Tensor, call: int, steps: int) -> int:
    """The denoising step, from 0, that a call of the denoiser belongs to.

    Schedulers of second order call it several times a step: at one timestep (Heun), or at others in between.

    Args:
        timesteps: of all calls, [calls], noisiest first.
        call: number of the call, from 0.
        steps: how many steps there are.
    """
    distinct = timesteps.unique()
    noisier = int((distinct > timesteps[call]).sum())
    return noisier if len(distinct) <= steps else noisier * steps // len(distinct)


def image_seed(seed: int, image_id: object) -> int:
    """The noise seed of one image, in [0, 2^63): it depends on the run's seed and the image's id, on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big") >> 1
