"""What calibration, pruning and generation ask of a text-to-image pipeline: one subclass a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from sdprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


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

    steps: int = 50
    guidance: float = 7.5
    height: Optional[int] = None
    width: Optional[int] = None
    scheduler: Optional[str] = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}: give 1 or more.")
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
    """What was drawn."""

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


class PipelineFamily(ABC):
    """A pipeline that is loaded late: constructing one reads nothing."""

    @abstractmethod
    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Read the weights, the first time from disk; afterwards only move them.

        Raises:
            InputError: no such model, or one without safetensors.
        """

    @property
    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """Every module of the loaded pipeline, by name."""

    @property
    @abstractmethod
    def prunable(self) -> list[str]:
        """Names of the components that can be pruned: all that turn text into latents."""

    @property
    def unused(self) -> list[str]:
        """Names of the model's components that are neither loaded nor saved, such as a safety checker."""
        return []

    @abstractmethod
    def skeleton(self, component: str) -> nn.Module:
        """A component without weights, on the meta device: its layers can be looked at before anything is loaded."""

    @abstractmethod
    def check(self, sampling: Sampling) -> None:
        """Raise InputError when images cannot be drawn so, e.g. for an unknown scheduler; loads nothing."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer that cuts captions."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> None:
        """Run the text encoders alone, as in generation without guidance; for calibration."""

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Which positions of the text encoders' inputs are no padding: bool [b, length]."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, decode: bool = True,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> Drawn:  # fmt: skip
        """Draw one image a prompt, from noise that depends on nothing but its seed.

        Args:
            prompts: one an image.
            seeds: one an image.
            sampling: how.
            decode: whether latents become pictures.
            before_step: called before each call of the denoiser with the number of its step, from 0 to steps - 1; some
                schedulers call it several times a step.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write a plain diffusers directory."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Model id with its resolved revision, or hashes of its files: what fingerprints need, without loading."""

    def origin(self) -> tuple[str, Optional[Path]]:
        """For model cards: the model as it was named, and where its files and its own card lie, if on this machine."""
        return "", None

    @property
    def name(self) -> str:
        """What people call the model; decides no fingerprint."""
        return type(self).__name__

    def require(self, names: Sequence[str]) -> None:
        """Raise InputError for a name that is no prunable component."""
        from sdprune.errors import unknown

        for name in names:
            if name not in self.prunable:
                raise unknown("component", name, self.prunable)
