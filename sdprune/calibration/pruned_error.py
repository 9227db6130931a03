"""Measuring what a component loses when one layer or block of it is pruned, alone or beside the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from sdprune.calibration.execution import evaluating
from sdprune.processes import Processes
from sdprune.pruning import PruneSpec, Statistics, Target
from sdprune.pruning.allocation.sensitivity import units_of
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.engine import prune_targets
from sdprune.pruning.error_path import ErrorPath, Unit
from sdprune.pruning.plan import Plan
from sdprune.pruning.statistics.pruned_error import HARMLESS, Probe


def alone_at(spec: PruneSpec, level: float) -> PruneSpec:
    """The specification by which a unit is pruned alone, with statistics of the dense model."""
    return replace(spec, sparsity=level, allocation=Uniform(), order="one_pass", mode="exact")


class Measurement:
    """Prunes the units of a dense component, and makes it dense again.

    Args:
        component: the module.
        targets: the layers that are pruned.
        spec: how, see `alone_at`; of the sparsities those of the probe count.
        statistics: of the dense model, as the criterion reads them.
        probe: which units, and which sparsities.
        run: runs the component on fixed inputs; its output, [samples, n].
    """

    def __init__(
        self, component: nn.Module, targets: Sequence[Target], spec: PruneSpec, statistics: Statistics, probe: Probe,
        run: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        self.component, self.spec, self.statistics, self.probe, self._run = component, spec, statistics, probe, run
        self.units = units_of(targets, probe.unit)

    def alone(self, done: frozenset[str], processes: Processes) -> Iterator[dict[str, Tensor]]:
        """The error of each unit that has layers beside `done`, by layer; the processes share the units.

        Yields:
            The layers of as many units as there are processes, the same on each of them.
        """
        dense = self._output()
        yield from self._shared(done, processes, lambda unit: self._of(self.units[unit], dense))

    def beside(
        self, alone: Mapping[str, Tensor], done: frozenset[str], processes: Processes
    ) -> Iterator[dict[str, Tensor]]:
        """The same of `pruned_error`; `alone` is `alone_error`, by layer."""
        dense, originals = self._output(), {name: _weights(members) for name, members in self.units.items()}
        sizes = {name: sum(weight.numel() for weight in weights) for name, weights in originals.items()}
        errors = {name: alone[members[0].name] for name, members in self.units.items()}
        path = ErrorPath([Unit(None, sizes[name], self.probe.levels, errors[name].tolist()) for name in self.units])
        lost = path.counts(path.within(HARMLESS))
        expected = dict(zip(self.units, (unit.error(n) for unit, n in zip(path.units, lost, strict=True)), strict=True))

        def of(unit: str) -> Tensor:
            members = self.units[unit]
            pruned = _weights(members)
            _write(members, originals[unit])
            added = together - self._error(dense)
            _write(members, pruned)
            ratio = added / expected[unit] if expected[unit] and math.isfinite(added) else 1.0
            return errors[unit] * math.sqrt(max(ratio, 1.0))

        try:
            for (name, members), n in zip(self.units.items(), lost, strict=True):
                self._prune(members, n / sizes[name])
            together = self._error(dense)
            yield from self._shared(done, processes, of)
        finally:
            for name, members in self.units.items():
                _write(members, originals[name])

    def _shared(
        self, done: frozenset[str], processes: Processes, of: Callable[[str], Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        left = [name for name, members in self.units.items() if any(target.name not in done for target in members)]
        for start in range(0, len(left), processes.world_size):
            found = {}
            for name in left[start + processes.rank : start + processes.rank + 1]:
                errors = of(name)
                found = {target.name: errors.clone() for target in self.units[name]}  # a file holds no tensor twice
            yield {name: errors for part in processes.all_gather(found) for name, errors in part.items()}

    def _of(self, members: Sequence[Target], dense: Tensor) -> Tensor:
        originals = _weights(members)
        errors = []
        for change in self._changes(members):
            try:
                change()
                errors.append(self._error(dense))
            finally:
                _write(members, originals)
        return torch.tensor(errors, dtype=torch.float64)

    def _changes(self, members: Sequence[Target]) -> Iterator[Callable[[], object]]:
        """What changes the weights of the layers of a unit, level by level; they are dense again before the next."""
        for level in self.probe.levels:
            yield partial(self._prune, members, level)

    def _prune(self, members: Sequence[Target], level: float) -> None:
        prune_targets(members, Plan(members, replace(self.spec, sparsity=level), self.statistics, {}))

    def _error(self, dense: Tensor) -> float:
        return float(((self._output() - dense).square().sum(1) / dense.square().sum(1)).mean())

    def _output(self) -> Tensor:
        with evaluating(self.component):
            return self._run().double()


def _weights(targets: Sequence[Target]) -> list[Tensor]:
    return [target.weight.detach().clone() for target in targets]


def _write(targets: Sequence[Target], weights: Sequence[Tensor]) -> None:
    for target, weight in zip(targets, weights, strict=True):
        target.weight.detach().copy_(weight)
