"""Measuring what a component loses when one layer or block of it alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from sdprune.pruning.plan import Plan
from sdprune.pruning.statistics.pruned_error import Probe


def alone_at(spec: PruneSpec, level: float) -> PruneSpec:
    """The specification by which a unit is pruned alone, with statistics of the dense model."""
    return replace(spec, sparsity=level, allocation=Uniform(), order="one_pass", mode="exact")


class Measurement:
    """Prunes the units of a dense component one at a time, and makes it dense again.

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

    def measure(self, done: frozenset[str], processes: Processes) -> Iterator[dict[str, Tensor]]:
        """Errors [levels] of the units that have layers beside `done`, by layer; the processes share the units.

        Yields:
            The layers of as many units as there are processes, the same on each of them.
        """
        left = [members for members in self.units.values() if any(target.name not in done for target in members)]
        dense = self._output()
        for start in range(0, len(left), processes.world_size):
            found = {}
            for members in left[start + processes.rank : start + processes.rank + 1]:
                errors = self._of(members, dense)
                found = {target.name: errors.clone() for target in members}  # a file holds no tensor twice
            yield {name: errors for part in processes.all_gather(found) for name, errors in part.items()}

    def _of(self, members: Sequence[Target], dense: Tensor) -> Tensor:
        originals = [target.weight.detach().clone() for target in members]
        errors = []
        for change in self._changes(members):
            try:
                change()
                error = (self._output() - dense).square().sum(1) / dense.square().sum(1)
                errors.append(float(error.mean()))
            finally:
                for target, original in zip(members, originals, strict=True):
                    target.weight.detach().copy_(original)
        return torch.tensor(errors, dtype=torch.float64)

    def _changes(self, members: Sequence[Target]) -> Iterator[Callable[[], object]]:
        """What changes the weights of the layers of a unit, level by level; they are dense again before the next."""
        for level in self.probe.levels:
            plan = Plan(members, replace(self.spec, sparsity=level), self.statistics, {})
            yield partial(prune_targets, members, plan)

    def _output(self) -> Tensor:
        with evaluating(self.component):
            return self._run().double()
