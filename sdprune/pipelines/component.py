"""A prunable part of a pipeline: what calibration, pruning and budgets ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING, Any, ClassVar, Optional

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdprune.pipelines.base import DiffusersFamily
    from sdprune.pipelines.sampling import Sampling


class _Reached(Exception):  # noqa: N818  no error
    """Ends a run behind the component that was wanted."""


class Component(ABC):
    """One part of a pipeline that turns text into latents.

    Args:
        family: the pipeline.
        name: of the part, as in `pipe.components`.
    """

    role: ClassVar[str]
    """`text` or `denoiser`: budgets split the pruned weights between the two."""
    is_chain: ClassVar[bool]
    """Whether its blocks run one after another, each on what the one before gave: then they can be run one by one."""

    def __init__(self, family: DiffusersFamily, name: str) -> None:
        self.family, self.name = family, name

    @property
    def module(self) -> nn.Module:
        """The module, once the pipeline is loaded."""
        return self.family.components[self.name]

    def meta_module(self) -> nn.Module:
        """The module without weights, on the meta device; nothing has to be loaded."""
        return self.family.meta_module(self.name)

    @abstractmethod
    def steps(self, sampling: Sampling) -> int:
        """How many denoising steps it runs for one prompt."""

    @abstractmethod
    def run(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> None:  # fmt: skip
        """Run it on prompts, as generation does; what only later parts need is left out.

        Args:
            prompts: one an item.
            seeds: of the noise, one an item.
            sampling: how images are drawn.
            before_step: called before each call with the number of its denoising step.
        """

    @abstractmethod
    def dense_inputs(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """Keep the inputs that it has in the model as it is now.

        Args:
            prompts: one an item.
            seeds: of the noise, one an item.
            sampling: how images are drawn.
            steps: at how many denoising steps, in the middle of equal parts of the drawing.

        Returns:
            Runs the component on these inputs, and returns what the pipeline makes of its output: [samples, n].
        """

    @abstractmethod
    def predictions(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """The same, but what is returned gives the guided prediction that the denoiser makes of the component's output,
        on the latents of the model as it is now: [samples * steps, n]."""

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> Optional[Tensor]:
        """Which positions of its inputs are no padding: bool [b, length]; None where it reads no tokens."""


class TextEncoder(Component):
    """Reads tokens. Runs without guidance: the empty prompt would count as often as all others together."""

    role = "text"
    is_chain = True

    def steps(self, sampling: Sampling) -> int:  # noqa: D102
        return 1

    def run(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> None:  # fmt: skip
        def stop(*_: Any) -> None:
            raise _Reached

        handle = self.module.register_forward_hook(stop)
        try:
            with suppress(_Reached):
                self.family.encode(prompts)
        finally:
            handle.remove()

    def dense_inputs(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        import torch

        return lambda: torch.cat([one.flatten(1) for one in self.family.encode(prompts)], 1)

    def predictions(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        denoiser = self.family.prunable[self.family.denoiser]
        assert isinstance(denoiser, Denoiser)
        return denoiser.from_text(prompts, seeds, sampling, steps)

    def tokens(self, prompts: Sequence[str]) -> Optional[Tensor]:  # noqa: D102
        tokenizer = self.family.tokenizers[self.name.replace("text_encoder", "tokenizer")]
        kept = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        return tokenizer(list(prompts), return_tensors="pt", **kept)["attention_mask"].bool()


class Denoiser(Component):
    """Predicts noise. Runs by drawing images, all steps, with the guidance of generation."""

    role = "denoiser"
    is_chain = False

    def steps(self, sampling: Sampling) -> int:  # noqa: D102
        return sampling.steps

    def run(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> None:  # fmt: skip
        self.family.generate(prompts, seeds, sampling, decode=False, before_step=before_step)

    def dense_inputs(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        calls = self._calls(prompts, seeds, sampling, steps)
        return lambda: self._guided(calls, len(prompts), sampling.guidance)

    def predictions(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        return self.dense_inputs(prompts, seeds, sampling, steps)

    def from_text(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """The same, but the text encoders run anew each time."""
        calls = self._calls(prompts, seeds, sampling, steps)

        def run() -> Tensor:
            (first,) = self._calls(prompts, seeds, sampling, 1, first_alone=True)
            return self._guided([_at_latents(first, call) for call in calls], len(prompts), sampling.guidance)

        return run

    def _calls(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int, first_alone: bool = False
    ) -> list[BoundArguments]:
        """Arguments of the first call in each of so many denoising steps, or in the first step alone."""
        wanted = {int((number + 0.5) * sampling.steps / steps) for number in range(min(steps, sampling.steps))}
        calls: dict[int, BoundArguments] = {}
        now = 0

        def before_step(step: int) -> None:
            nonlocal now
            now = step

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if first_alone or (now in wanted and now not in calls):
                calls[now] = signature(module.forward).bind(*args, **kwargs)
            if first_alone:
                raise _Reached

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with suppress(_Reached):
                self.run(prompts, seeds, sampling, before_step)
        finally:
            handle.remove()
        return list(calls.values())

    def _guided(self, calls: Sequence[BoundArguments], items: int, guidance: float) -> Tensor:
        """Guided predictions of a batch that holds each item twice, first without its prompt (Ho & Salimans 2022, eq.
        6); without guidance it holds each once."""
        import torch

        found = []
        for call in calls:
            with torch.no_grad():
                prediction = self.module(*call.args, **call.kwargs)[0]
            if len(prediction) != items:
                without, with_prompt = prediction.chunk(2)
                prediction = without + guidance * (with_prompt - without)
            found.append(prediction.flatten(1))
        return torch.cat(found)

    def tokens(self, prompts: Sequence[str]) -> Optional[Tensor]:  # noqa: D102
        return None


def _at_latents(call: BoundArguments, other: BoundArguments) -> BoundArguments:
    """A denoiser's call with the latents of another one, its first argument in every family, and that one's step."""
    taken = {name: other.arguments[name] for name in (next(iter(other.arguments)), "timestep")}
    return BoundArguments(call.signature, {**call.arguments, **taken})
