"""A prunable part of a pipeline: what calibration, pruning and budgets ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from sdprune.pruning.targets import layer_kind

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
    def calls(self, sampling: Sampling) -> int:
        """How often it is called for one batch."""

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

    def counting(self, before_step: Callable[[int], None]) -> AbstractContextManager[Callable[[int], None]]:
        """Entered while it is called without the pipeline: what it gives is to be called when a step begins."""
        return nullcontext(before_step)

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

    def weights(self, copies: int, unconditional: float) -> list[float]:
        """How much each copy of a batch counts in the call that runs.

        Args:
            copies: how often the call holds the batch.
            unconditional: weight of the copy without prompts.
        """
        return [1.0] * copies

    def rows(self, layer: str) -> Optional[Sequence[int]]:
        """How many rows each item has in a layer that sees the items one behind the other, in the call that runs; None
        where inputs are [items, ...]."""
        return None

    def idle(self, layers: Sequence[str], module: Optional[nn.Module] = None) -> list[str]:
        """Shell patterns of the layers, of given kinds, that nothing depends on.

        Args:
            layers: the kinds.
            module: the component, if it is at hand, with weights or without.
        """
        patterns = self.family.idle.get(self.name)
        if not patterns:
            return []
        names = [name for name, one in (module or self.meta_module()).named_modules() if layer_kind(one) in layers]
        named = [_of_last_block(pattern, names) for pattern in patterns]
        return [pattern for pattern in named if any(fnmatchcase(name, pattern) for name in names)]


def _of_last_block(pattern: str, names: Sequence[str]) -> str:
    """A pattern with the number of the last block in place of `{last}`."""
    before = pattern.partition("{last}")[0]
    numbers = [name.removeprefix(before).partition(".")[0] for name in names if name.startswith(before)]
    return pattern.replace("{last}", max(filter(str.isdigit, numbers), key=int, default="{last}"))


class TextEncoder(Component):
    """Reads tokens. Runs without guidance: the empty prompt would count as often as all others together."""

    role = "text"

    def steps(self, sampling: Sampling) -> int:  # noqa: D102
        return 1

    def calls(self, sampling: Sampling) -> int:  # noqa: D102
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
        found: dict[str, Any] = {}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.update(signature(module.forward).bind(*args, **kwargs).arguments)
            raise _Reached

        handle = self.module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with suppress(_Reached):
                self.family.encode(prompts)
        finally:
            handle.remove()
        if found.get("attention_mask") is not None:
            return found["attention_mask"].bool()
        end = found["input_ids"] == self.family.tokenizers[_tokenizer_of(self.name)].eos_token_id
        return end.cumsum(1) - end.long() == 0  # up to the first end, with it


class Denoiser(Component):
    """Predicts noise. Runs by drawing images, all steps, with the guidance of generation."""

    role = "denoiser"

    def __init__(self, family: DiffusersFamily, name: str) -> None:
        super().__init__(family, name)
        self._number = -1
        """Number of the current call in its step: some families predict without prompts in a call of its own."""
        self._arguments: BoundArguments | None = None
        """Of the current call."""

    def run(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> None:  # fmt: skip
        with self.counting(before_step or (lambda step: None)) as begin_step:
            self.family.generate(prompts, seeds, sampling, decode=False, before_step=begin_step)

    @contextmanager
    def counting(self, before_step: Callable[[int], None]) -> Iterator[Callable[[int], None]]:  # noqa: D102
        def begin_step(step: int) -> None:
            self._number = -1
            before_step(step)

        def begin_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._number += 1
            self._arguments = signature(module.forward).bind(*args, **kwargs)

        handle = self.module.register_forward_pre_hook(begin_call, with_kwargs=True)
        try:
            yield begin_step
        finally:
            handle.remove()
            self._arguments = None

    def steps(self, sampling: Sampling) -> int:  # noqa: D102
        return sampling.steps

    def calls(self, sampling: Sampling) -> int:  # noqa: D102
        return self.family.calls(sampling)

    def weights(self, copies: int, unconditional: float) -> list[float]:  # noqa: D102
        guided = self._number + copies > 1
        place = self.family.unconditional - self._number
        return [unconditional if guided and copy == place else 1.0 for copy in range(copies)]

    def rows(self, layer: str) -> Optional[Sequence[int]]:  # noqa: D102
        return None if self._arguments is None else self.family.rows(layer, self._arguments.arguments)

    def dense_inputs(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        found = self._steps(prompts, seeds, sampling, steps)
        return lambda: self._guided(found, len(prompts), sampling.guidance)

    def predictions(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        return self.dense_inputs(prompts, seeds, sampling, steps)

    def from_text(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """The same, but the text encoders run anew each time."""
        found = self._steps(prompts, seeds, sampling, steps)

        def run() -> Tensor:
            (first,) = self._steps(prompts, seeds, sampling, 1, calls=len(found[0]))
            moved = [[self._at(own, call) for own, call in zip(first, step, strict=True)] for step in found]
            return self._guided(moved, len(prompts), sampling.guidance)

        return run

    def _steps(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int, calls: Optional[int] = None
    ) -> list[list[BoundArguments]]:
        """The calls of one prediction in each of so many denoising steps, or the first calls of all."""
        wanted = {int((number + 0.5) * sampling.steps / steps) for number in range(min(steps, sampling.steps))}
        found: dict[int, list[BoundArguments]] = {}
        now, recording = 0, False

        def before_step(step: int) -> None:
            nonlocal now, recording
            now, recording = step, calls is not None or (step in wanted and step not in found)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if recording:
                found.setdefault(now, []).append(signature(module.forward).bind(*args, **kwargs))
            if calls is not None and len(found[now]) == calls:
                raise _Reached

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with suppress(_Reached):
                self.run(prompts, seeds, sampling, before_step)
        finally:
            handle.remove()
        return list(found.values())

    def _at(self, call: BoundArguments, other: BoundArguments) -> BoundArguments:
        """A call with the latents and the timestep of another one."""
        taken = {name: other.arguments[name] for name in (next(iter(other.arguments)), self.family.timestep)}
        return BoundArguments(call.signature, {**call.arguments, **taken})

    def _guided(self, steps: Sequence[Sequence[BoundArguments]], items: int, guidance: float) -> Tensor:
        """Guided predictions of steps that predict each item twice, or without guidance once."""
        import torch

        found = []
        for calls in steps:
            with torch.no_grad():
                prediction = torch.cat([self._predicted(call) for call in calls])
            if len(prediction) != items:
                halves = prediction.chunk(2)
                without = self.family.unconditional
                prediction = self.family.guided(halves[without], halves[1 - without], guidance)
            found.append(prediction.flatten(1))
        return torch.cat(found)

    def _predicted(self, call: BoundArguments) -> Tensor:
        """What the denoiser predicts of the latents: [items, ...], without channels that say how sure it is."""
        import torch

        latents = next(iter(call.arguments.values()))
        prediction = self.module(*call.args, **call.kwargs)[0]
        if isinstance(prediction, list):
            return torch.stack(prediction)
        return prediction[:, : latents.shape[1]]

    def tokens(self, prompts: Sequence[str]) -> Optional[Tensor]:  # noqa: D102
        return None


def _tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")
