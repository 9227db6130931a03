"""Statistics of one component, pass by pass; in sequential order it is pruned between the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Optional

from torch import Tensor, nn

from sdprune.calibration.execution import evaluating
from sdprune.calibration.observer import BatchSums, InputObserver
from sdprune.calibration.passes import Pass
from sdprune.calibration.replay import Replay
from sdprune.pruning import PruneSpec, Statistics, Target
from sdprune.pruning.engine import prune_targets
from sdprune.pruning.plan import Plan


class Gathering:
    """Runs one component for its passes. The component is in evaluation mode while it runs.

    Args:
        component: the module, dense.
        passes: see `plan_passes`.
        spec: in sequential order, how layers are pruned between the passes.
        dense_statistics: what the allocation of `spec` reads.
        chain: whether the component is a plain chain of blocks, as text encoders are. In sequential order a pass then
            runs no more than two of them, on what the one before gave.
    """

    def __init__(
        self,
        component: nn.Module,
        passes: Sequence[Pass],
        spec: Optional[PruneSpec] = None,
        dense_statistics: Optional[Statistics] = None,
        chain: bool = False,
    ) -> None:
        self.component, self.passes, self.spec = component, list(passes), spec
        targets = list({target.name: target for one in passes for _, ts in one.observed for target in ts}.values())
        self.targets = targets
        self._plan = Plan(targets, spec, {}, dense_statistics or {}) if spec else None
        self._replay = Replay(component, _by_stage(passes)) if spec and chain else None
        self._originals: dict[str, Tensor] = {}

    def visit(
        self, number: int, key: int, run: Callable[[Sequence[InputObserver]], Any],
        set_up: Callable[[InputObserver], None] = lambda _: None,
    ) -> dict[str, BatchSums]:  # fmt: skip
        """Run one batch and return its sums by statistic.

        Args:
            number: of the pass.
            key: of the batch; the same in every pass.
            run: runs the component on the batch; it may set the observers' step.
            set_up: tells each observer what of the batch counts.
        """
        observers = [InputObserver(targets, one) for one, targets in self.passes[number].observed]
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.component))
            for observer in observers:
                set_up(observer)
                stack.enter_context(observer.observing())
            if self._replay is None:
                run(observers)
            else:
                self._replay.run(key, observers, lambda: run(observers))
        return {observer.statistic.name: observer.take() for observer in observers}

    def finish(self, number: int, statistics: Statistics) -> None:
        """A pass has been over all batches: in sequential order layers are pruned now.

        Args:
            number: of the pass.
            statistics: of all layers so far, by statistic, then by layer.
        """
        if self._plan is None:
            return
        names = self._plan.spec.criterion.statistics
        # What calibration never runs is reported when the component is pruned; here it stays as it is.
        ready = [
            target
            for group in self.passes[number].prune
            if all(one.name in statistics.get(name, {}) for one in group for name in names)
            for target in group
        ]
        for target in ready:
            self._originals[target.name] = target.weight.detach().clone()
        self._plan.statistics = statistics
        prune_targets(ready, self._plan)

    def close(self) -> None:
        """Make the component dense again."""
        for target in self.targets:
            if target.name in self._originals:
                target.weight.detach().copy_(self._originals[target.name])
        self._originals = {}
        if self._replay is not None:
            self._replay.outputs = {}


def _by_stage(passes: Sequence[Pass]) -> list[list[Target]]:
    found: dict[int, dict[str, Target]] = {}
    for one in passes:
        for _, targets in one.observed:
            found.setdefault(one.stage, {}).update({target.name: target for target in targets})
    return [list(stage.values()) for stage in found.values()]
