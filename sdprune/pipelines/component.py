"""A prunable part of a pipeline: what calibration, pruning and budgets ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from inspect import BoundArguments, signature
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

from sdprune.pruning.targets import layer_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdprune.pipelines.base import DiffusersFamily
    from sdprune.pipelines.sampling import Sampling


class _Reached(Exception):  # noqa: N818  no error
    """Ends a run behind the component that was wanted."""


class _Drawing(NamedTuple):
    """Prompts that are drawn together, and the calls of the denoiser in one step of it."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    calls: list[BoundArguments]


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
        self._number = -1
        """Number of the current call in its step: prompts may run in one call and what guides them in another."""
        self._arguments: BoundArguments | None = None
        """Of the current call."""

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
        """How often it is called for one batch, at most: not every pipeline encodes an empty prompt."""

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

    @contextmanager
    def counting(self, before_step: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Entered while it runs, by its pipeline or without: what it gives is to be called when a step begins."""

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

    @abstractmethod
    def dense_inputs(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """Keep the inputs that it has in the model as it is now.

        Args:
            prompts: one an item.
            seeds: of the noise, one an item.
            sampling: how images are drawn.
            steps: at how many denoising steps, in the middle of equal parts of the drawing: a denoiser sees each
                prompt at one of them, in turn.

        Returns:
            Runs the component on these inputs, and returns what the pipeline makes of its output: [samples, n].
        """

    @abstractmethod
    def predictions(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """The same, but what is returned gives the guided prediction that the denoiser makes of the component's output,
        on the latents of the model as it is now."""

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
        if not self.family.idle.get(self.name):
            return []
        there = _names(module or self.meta_module(), layers)
        whole = self.family.files.empty_module(self.name, whole=True)  # its files may lack the last block
        return [one for one in self.declared_idle(whole, layers) if any(fnmatchcase(name, one) for name in there)]

    def declared_idle(self, whole: nn.Module, layers: Sequence[str]) -> list[str]:
        """The patterns of the family, with the number of the last block in place of `{last}`.

        Args:
            whole: the module that the configuration describes.
            layers: kinds of layers.
        """
        names = _names(whole, layers)
        return [_of_last_block(pattern, names) for pattern in self.family.idle.get(self.name, ())]


def _names(module: nn.Module, layers: Sequence[str]) -> list[str]:
    return [name for name, one in module.named_modules() if layer_kind(one) in layers]


def _of_last_block(pattern: str, names: Sequence[str]) -> str:
    """A pattern with the number of the last block in place of `{last}`."""
    before = pattern.partition("{last}")[0]
    numbers = [name.removeprefix(before).partition(".")[0] for name in names if name.startswith(before)]
    return pattern.replace("{last}", max(filter(str.isdigit, numbers), key=int, default="{last}"))


class TextEncoder(Component):
    """Reads tokens. Guided, the empty or negative prompts run in a call of their own, after the others."""

    role = "text"

    def steps(self, sampling: Sampling) -> int:  # noqa: D102
        return 1

    def calls(self, sampling: Sampling) -> int:  # noqa: D102
        return 2 if sampling.guidance > 1 else 1

    def run(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> None:  # fmt: skip
        def stop(*_: Any) -> None:
            if self._number + 1 == self.calls(sampling):
                raise _Reached

        handle = self.module.register_forward_hook(stop)
        try:
            with suppress(_Reached), self.counting(before_step or (lambda step: None)) as begin_step:
                begin_step(0)
                self.family.encode(prompts, sampling.guidance)
        finally:
            handle.remove()

    def weights(self, copies: int, unconditional: float) -> list[float]:  # noqa: D102
        return [unconditional if self._number > 0 else 1.0] * copies

    def dense_inputs(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        import torch

        def encoded() -> Tensor:
            return torch.cat([one.flatten(1) for one in self.family.encode(prompts, sampling.guidance)], 1)

        return encoded

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

    def run(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> None:  # fmt: skip
        with self.counting(before_step or (lambda step: None)) as begin_step:
            self.family.generate(prompts, seeds, sampling, decode=False, before_step=begin_step)

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
        import torch

        drawn = self._spread(prompts, seeds, sampling, steps)
        return lambda: torch.cat([self._guided(one.calls, len(one.prompts), sampling.guidance) for one in drawn])

    def predictions(  # noqa: D102
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        return self.dense_inputs(prompts, seeds, sampling, steps)

    def from_text(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int
    ) -> Callable[[], Tensor]:
        """The same, but the text encoders run anew each time."""
        import torch

        drawn = self._spread(prompts, seeds, sampling, steps)

        def of(one: _Drawing) -> Tensor:
            first = self._calls(one.prompts, one.seeds, sampling, 0, most=len(one.calls))
            moved = [self._at(own, call) for own, call in zip(first, one.calls, strict=True)]
            return self._guided(moved, len(one.prompts), sampling.guidance)

        return lambda: torch.cat([of(one) for one in drawn])

    def _spread(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, steps: int) -> list[_Drawing]:
        """The calls of one prediction of each prompt, in turn at one of so many denoising steps."""
        count = min(steps, sampling.steps, len(prompts))
        groups = [(prompts[place::count], seeds[place::count]) for place in range(count)]
        wanted = [int((place + 0.5) * sampling.steps / count) for place in range(count)]
        return [
            _Drawing(*group, self._calls(*group, sampling, step)) for group, step in zip(groups, wanted, strict=True)
        ]

    def _calls(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, step: int, most: Optional[int] = None
    ) -> list[BoundArguments]:
        """The calls of one prediction in a denoising step, or the first of them; what comes later does not run."""
        found: list[BoundArguments] = []
        recording = False

        def before_step(now: int) -> None:
            nonlocal recording
            if found:
                raise _Reached
            recording = now == step

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if recording:
                found.append(signature(module.forward).bind(*args, **kwargs))
            if len(found) == most:
                raise _Reached

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with suppress(_Reached):
                self.run(prompts, seeds, sampling, before_step)
        finally:
            handle.remove()
        return found

    def _at(self, call: BoundArguments, other: BoundArguments) -> BoundArguments:
        """A call with the latents and the timestep of another one."""
        taken = {name: other.arguments[name] for name in (next(iter(other.arguments)), self.family.timestep)}
        return BoundArguments(call.signature, {**call.arguments, **taken})

    def _guided(self, calls: Sequence[BoundArguments], items: int, guidance: float) -> Tensor:
        """The guided prediction of calls that predict each item twice, or without guidance once: [items, n]."""
        import torch

        with torch.no_grad():
            prediction = torch.cat([self._predicted(call) for call in calls])
        if len(prediction) != items:
            halves = prediction.chunk(2)
            without = self.family.unconditional
            prediction = self.family.guided(halves[without], halves[1 - without], guidance)
        return prediction.flatten(1)

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
