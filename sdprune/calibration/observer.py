"""Summing up the inputs of layers while their component runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.statistics import InputStatistic
from sdprune.pruning.targets import Target


@dataclass
class BatchSums:
    """The sums over a batch: by layer, with how often each layer was called, by denoising step."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, Counter[int]] = field(default_factory=dict)


class InputObserver:
    """Sums one statistic over the inputs of some layers while their component runs.

    Layers that share a weight count as one layer that is called several times.

    Args:
        targets: the layers.
        statistic: what to sum.

    Before a batch set what is to count; by default everything counts 1:
        batch_size, valid: items of the batch and how many of them are no filler. Under classifier-free guidance a
            denoiser sees them twice over, with and without their prompts, in one call or in two.
        weights: of each copy of the batch in the call that runs, given how many there are.
        rows: how many rows each item has, given the name of a layer that sees items of unlike length one behind the
            other; None for a layer that sees [items, ...].
        tokens: bool [batch_size, length]: positions that count, in layers that see [batch_size, length, columns].
        step: the denoising step that runs, from 0.
    """

    def __init__(self, targets: Sequence[Target], statistic: InputStatistic) -> None:
        self.targets = {target.name: target for target in targets}
        self.statistic = statistic
        self.batch_size: Optional[int] = None
        self.valid: Optional[int] = None
        self.weights: Callable[[int], Sequence[float]] = lambda copies: [1.0] * copies
        self.rows: Callable[[str], Optional[Sequence[int]]] = lambda layer: None
        self.tokens: Optional[Tensor] = None
        self.step = 0
        self._sums = BatchSums()
        self._last: tuple[Any, ...] = ()

    def take(self) -> BatchSums:
        """The sums since the last take, averaged over a layer's calls in a step; starts again from 0."""
        sums, self._sums, self._last = self._sums, BatchSums(), ()
        for name, total in sums.totals.items():
            self.statistic.average(total, sums.calls[name])
        return sums

    @contextmanager
    def observing(self) -> Iterator[InputObserver]:
        """Hooks on every layer, removed at the end."""
        handles = [
            one.module.register_forward_pre_hook(partial(self._observe, one), with_kwargs=True)
            for target in self.targets.values()
            for one in target.by_module
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _observe(self, target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        if self.batch_size is None and self.valid is None and self.tokens is None:
            return inputs
        rows = self.rows(name)
        items = len(inputs) if rows is None else len(rows)
        if not self.batch_size or items % self.batch_size:
            raise InputError(
                f"Layer {name!r} sees {items} items, no multiple of batch_size {self.batch_size}: "
                "set batch_size beside valid, or choose batches that need no filler."
            )
        weights = self.weights(items // self.batch_size)
        if rows is not None:
            parts = enumerate(inputs.split(list(rows)))
            valid = self.batch_size if self.valid is None else self.valid
            kept = [(number // self.batch_size, part) for number, part in parts if number % self.batch_size < valid]
            return torch.cat([inputs[:0].float(), *(_weighted(part, weights[copy]) for copy, part in kept)])
        copies = inputs.unflatten(0, (-1, self.batch_size))
        if any(weight != 1 for weight in weights):
            copies = torch.stack([_weighted(copy, weight) for copy, weight in zip(copies, weights, strict=True)])
        copies = copies[:, : self.valid]
        if self.tokens is not None and copies.shape[2:-1] == self.tokens.shape[1:]:
            return copies[:, self.tokens[: self.valid].to(copies.device)]
        return copies.flatten(0, 1)


def _weighted(inputs: Tensor, weight: float) -> Tensor:
    return inputs.float() * math.sqrt(weight)


class Totals:
    """Sums of whole batches, added in their order: to the same bits on any number of processes.

    Args:
        statistic: what they are sums of.
    """

    def __init__(self, statistic: InputStatistic) -> None:
        self.statistic = statistic
        self.samples = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, layer: str, total: Tensor) -> None:
        """Add one layer's sum over the next batch, where that lies."""
        if layer in self.sums:
            self.sums[layer] = self.sums[layer].to(total.device).add_(total)
        else:
            self.sums[layer] = total.clone()

    def finish(self) -> dict[str, Tensor]:
        """The statistic by layer.

        Raises:
            InputError: no samples.
        """
        if self.samples < 1:
            raise InputError(f"Statistics of {self.samples} samples: calibrate with at least one.")
        return {name: self.statistic.finish(total, self.samples) for name, total in self.sums.items()}
