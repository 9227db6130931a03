"""What criteria need to know of a layer's inputs, summed up batch by batch.

The sums of each batch are kept apart and added in batch order, so that they come out to the same bits on any number of
processes and after any interruption.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Optional, get_args

import torch
from torch import Tensor, nn

from sdprune.errors import InputError, unknown
from sdprune.pruning.targets import Target

Timesteps = Literal["uniform", "linear", "log_decrease", "log_increase"]
_CHUNK = 1 << 18  # input numbers squared at a time: their fp64 copies stay in cache
_UNFOLDED = 1 << 24  # unfolded input numbers at a time: bounds what a convolution's Hessian takes beside itself


def timestep_weights(name: Timesteps, steps: int) -> list[float]:
    """How much each denoising step counts, first (noisiest) to last.

    `log_decrease` is 0.8 + 0.4 * ln(T - i) / ln(T) at step i of T (OBS-Diff, 2025); `log_increase` is that read
    backwards, `linear` falls from 1.2 to 0.8 evenly, `uniform` is 1 throughout.

    Raises:
        InputError: for an unknown name.
    """
    if name not in get_args(Timesteps):
        raise unknown("timestep weighting", name, get_args(Timesteps))
    if name == "uniform" or steps == 1:
        return [1.0] * steps
    if name == "linear":
        return [1.2 - 0.4 * i / (steps - 1) for i in range(steps)]
    falling = [0.8 + 0.4 * math.log(steps - i) / math.log(steps) for i in range(steps)]
    return falling if name == "log_decrease" else falling[::-1]


class Statistic(ABC):
    """A sum over a layer's inputs."""

    name: str

    @abstractmethod
    def empty(self, target: Target) -> Tensor:
        """Zeros of the sum's shape, on the layer's device."""

    @abstractmethod
    def term(self, target: Target, inputs: Tensor) -> Tensor:
        """What inputs, in the layer's own shape, contribute."""

    @abstractmethod
    def add(self, total: Tensor, term: Tensor, step: int) -> None:
        """Add a contribution of one denoising step, in place."""

    @abstractmethod
    def average(self, total: Tensor, calls: Mapping[int, int]) -> None:
        """Bring a sum over one batch to one call of the layer a denoising step, in place.

        Args:
            total: the sum.
            calls: how often the layer was called, by step.
        """

    @abstractmethod
    def finish(self, total: Tensor, samples: int) -> Tensor:
        """The statistic, float32, from the sum over `samples` prompts."""


class InputNorm(Statistic):
    """`input_norm`: the sum of x_j^2 over all positions, by denoising step: float64 [steps, groups, columns].

    Divided by the number of samples it is what Wanda's running statistic ends with. As there, every call adds its
    samples to that number: a layer that is called k times in a step has the mean over its calls, not their sum, so that
    it can be ranked beside layers that are called once.
    """

    name = "input_norm"

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps

    def empty(self, target: Target) -> Tensor:  # noqa: D102
        columns = target.shape[1]
        return torch.zeros(self.steps, target.groups, columns, dtype=torch.float64, device=target.weight.device)

    def term(self, target: Target, inputs: Tensor) -> Tensor:  # noqa: D102
        # In fp64 a square of fp32 is exact, and millions of positions add up without loss.
        conv = target.kind == "Conv2d"
        flat = inputs.flatten(1) if conv else inputs.reshape(-1, inputs.shape[-1])
        sums = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
        for part in flat.split(max(1, _CHUNK // max(1, flat.shape[1]))):
            sums += part.to(torch.float64, copy=True).square_().sum(0)
        if not conv:
            return sums[None]
        # Unfolding only copies, so that it may follow the sum over items.
        return target.columns(sums.view(1, *inputs.shape[1:])).sum(1)

    def add(self, total: Tensor, term: Tensor, step: int) -> None:  # noqa: D102
        total[step] += term

    def average(self, total: Tensor, calls: Mapping[int, int]) -> None:  # noqa: D102
        for step, n in calls.items():
            if n > 1:
                total[step] /= n

    def finish(self, total: Tensor, samples: int) -> Tensor:  # noqa: D102
        return (total / samples).float()


class Hessian(Statistic):
    """`hessian`: 2 * sum_i a_i X_i^T X_i / sum_i a_i over denoising steps i, float32 [groups, columns, columns].

    X_i are the inputs [positions, columns] of step i and a_i the step's weight; divided by the number of samples. Where
    a layer is called several times in a step, i runs over the calls, here and in the divisor.
    (Frantar & Alistarh 2023, SparseGPT; the weights are those of OBS-Diff, 2025.)

    Args:
        weights: of the denoising steps.
    """

    name = "hessian"

    def __init__(self, weights: Sequence[float] = (1.0,)) -> None:
        self.weights = list(weights)

    @staticmethod
    def numel(target: Target) -> int:
        """Numbers in the Hessian of a layer."""
        return target.groups * target.shape[1] ** 2

    def empty(self, target: Target) -> Tensor:  # noqa: D102
        columns = target.shape[1]
        return torch.zeros(target.groups, columns, columns, device=target.weight.device)

    def term(self, target: Target, inputs: Tensor) -> Tensor:  # noqa: D102
        total = self.empty(target)
        rows = inputs if target.kind == "Conv2d" else inputs.reshape(-1, inputs.shape[-1])
        per_row = max(1, target.columns(rows[:1]).numel()) if len(rows) else 1
        for part in rows.split(max(1, _UNFOLDED // per_row)):
            x = target.columns(part.float())
            total.baddbmm_(x.transpose(1, 2), x)
        return total

    def add(self, total: Tensor, term: Tensor, step: int) -> None:  # noqa: D102
        total.add_(term, alpha=self.weights[step])

    def average(self, total: Tensor, calls: Mapping[int, int]) -> None:  # noqa: D102
        once = sum(self.weights)
        counted = sum(weight * max(1, calls.get(step, 0)) for step, weight in enumerate(self.weights))
        if counted != once:
            total *= once / counted

    def finish(self, total: Tensor, samples: int) -> Tensor:  # noqa: D102
        return total * (2 / (samples * sum(self.weights)))


STATISTICS: dict[str, type[Statistic]] = {cls.name: cls for cls in (InputNorm, Hessian)}


@dataclass
class Sums:
    """The sums over a batch: by layer, with how often each layer was called, by denoising step."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, Counter[int]] = field(default_factory=dict)


class Listener:
    """Sums one statistic over the inputs of some layers while their component runs.

    Layers that share a weight count as one layer that is called several times.

    Args:
        targets: the layers.
        statistic: what to sum.

    Before a batch set what is to count; by default everything counts 1:
        batch_size, valid: items of the batch and how many of them are no filler. Under classifier-free guidance a U-Net
            sees them twice over: [all items without a prompt, all items with theirs].
        unconditional: weight of the first of these halves.
        tokens: bool [batch_size, length]: positions that count, in layers that see [batch_size, length, columns].
        step: the denoising step that runs, from 0.
    """

    def __init__(self, targets: Sequence[Target], statistic: Statistic) -> None:
        self.targets = {target.name: target for target in targets}
        self.statistic = statistic
        self.batch_size: Optional[int] = None
        self.valid: Optional[int] = None
        self.unconditional = 1.0
        self.tokens: Optional[Tensor] = None
        self.step = 0
        self._sums = Sums()
        self._last: tuple[Any, ...] = ()

    def take(self) -> Sums:
        """The sums since the last take, averaged over a layer's calls in a step; starts again from 0."""
        sums, self._sums, self._last = self._sums, Sums(), ()
        for name, total in sums.totals.items():
            self.statistic.average(total, sums.calls[name])
        return sums

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """Hooks on every layer, removed at the end."""
        handles = [
            one.module.register_forward_pre_hook(partial(self._hear, one), with_kwargs=True)
            for target in self.targets.values()
            for one in target.by_module
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _hear(self, target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = target.inputs(args, kwargs)
        with torch.autocast(inputs.device.type, enabled=False):
            term = self._term(target, inputs)
        self._sums.calls.setdefault(target.name, Counter())[self.step] += 1
        if target.name not in self._sums.totals:
            self._sums.totals[target.name] = self.statistic.empty(target)
        self.statistic.add(self._sums.totals[target.name], term, self.step)

    def _term(self, target: Target, inputs: Tensor) -> Tensor:
        """The contribution; query, key and value get the very same tensor one after another, and share it."""
        key = (id(inputs), None if inputs.is_inference() else inputs._version)
        linear = target.kind != "Conv2d"
        if linear and key[1] is not None and self._last and self._last[0] == key:
            return self._last[2]
        term = self.statistic.term(target, self._counted(target.name, inputs))
        # Holding the inputs keeps their id from being given to others.
        self._last = (key, inputs, term) if linear else ()
        return term

    def _counted(self, name: str, inputs: Tensor) -> Tensor:
        """What of the inputs counts, multiplied with the root of its weight."""
        if self.valid is None and self.tokens is None and self.unconditional == 1:
            return inputs
        if not self.batch_size or len(inputs) % self.batch_size:
            raise InputError(
                f"Layer {name!r} sees {len(inputs)} items, no multiple of batch_size {self.batch_size}: "
                "set batch_size beside valid, or choose batches that need no filler."
            )
        copies = inputs.unflatten(0, (-1, self.batch_size))
        if self.unconditional != 1 and len(copies) == 2:
            copies = torch.cat([copies[:1].float() * math.sqrt(self.unconditional), copies[1:].float()])
        copies = copies[:, : self.valid]
        if self.tokens is not None and copies.shape[2:-1] == self.tokens.shape[1:]:
            return copies[:, self.tokens[: self.valid].to(copies.device)]
        return copies.flatten(0, 1)


class Totals:
    """Sums of whole batches, added in their order.

    Args:
        statistic: what they are sums of.
    """

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.samples = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor) -> None:
        """Add one layer's sum over the next batch."""
        if name in self.sums:
            self.sums[name] += total
        else:
            self.sums[name] = total.clone()

    def finish(self) -> dict[str, Tensor]:
        """The statistic by layer.

        Raises:
            InputError: no samples.
        """
        if self.samples < 1:
            raise InputError(f"Statistics of {self.samples} samples: calibrate with at least one.")
        return {name: self.statistic.finish(total, self.samples) for name, total in self.sums.items()}


def weigh(norms: Mapping[str, Tensor], timesteps: Timesteps) -> dict[str, Tensor]:
    """Input norms [steps, groups, columns] by layer, summed over their steps with weights: [groups, columns]."""
    return {name: _weighted(value, timesteps) for name, value in norms.items()}


def _weighted(norm: Tensor, timesteps: Timesteps) -> Tensor:
    if norm.dim() != 3:
        raise InputError(
            f"Statistic input_norm has shape {list(norm.shape)}, not [steps, groups, columns]: gather it with "
            "sdprune.gather."
        )
    weights = torch.tensor(timestep_weights(timesteps, len(norm)), dtype=torch.float64, device=norm.device)
    return ((weights[:, None, None] * norm.double()).sum(0) / weights.sum()).float()
