"""Statistics of one component, pass by pass; in sequential order it is pruned between the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Optional

from torch import Tensor, nn

from sdprune.calibration.execution import Flow, evaluating
from sdprune.calibration.observer import BatchSums, InputObserver
from sdprune.calibration.passes import Pass
from sdprune.calibration.replay import Replay
from sdprune.pruning import PruneSpec, Statistics
from sdprune.pruning.engine import prune_targets
from sdprune.pruning.plan import Plan

Replaying = AbstractContextManager[Callable[[int], None]]


class Gathering:
    """Runs one component for its passes. The component is in evaluation mode while it runs.

    Args:
        component: the module, dense.
        passes: see `plan_passes`.
        spec: in sequential order, how layers are pruned between the passes.
        dense_statistics: what the allocation of `spec` reads.
        flow: how values go through the component's blocks, where they are run one by one: then its pipeline runs once,
            and a pass runs no more blocks than it has to, on what those before them gave.
    """

    def __init__(
        self,
        component: nn.Module,
        passes: Sequence[Pass],
        spec: Optional[PruneSpec] = None,
        dense_statistics: Optional[Statistics] = None,
        flow: Optional[Flow] = None,
    ) -> None:
        self.component, self.passes, self.spec = component, list(passes), spec
        targets = list({target.name: target for one in passes for _, ts in one.observed for target in ts}.values())
        self.targets = targets
        self._plan = Plan(targets, spec, {}, dense_statistics or {}) if spec else None
        self._replay = Replay(component, flow, passes) if flow is not None else None
        self._originals: dict[str, Tensor] = {}  # on the CPU: a GPU has no room for a model twice

    def visit(
        self, number: int, key: int, run: Callable[[Callable[[int], None]], Any],
        set_up: Callable[[InputObserver], None] = lambda _: None,
        replaying: Callable[[Callable[[int], None]], Replaying] = nullcontext,
    ) -> dict[str, BatchSums]:  # fmt: skip
        """Run one batch and return its sums by statistic.

        Args:
            number: of the pass.
            key: of the batch; the same in every pass.
            run: runs the component on the batch; calls its argument with the number of each denoising step.
            set_up: tells each observer what of the batch counts.
            replaying: entered while the component runs without its pipeline; see `Subject.replaying`.
        """
        observers = [InputObserver(targets, one) for one, targets in self.passes[number].observed]

        def before_step(step: int) -> None:
            for observer in observers:
                observer.step = step

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.component))
            if self._replay is not None and key not in self._replay.calls:
                with self._dense():
                    self._replay.record(key, run)
            for observer in observers:
                set_up(observer)
                stack.enter_context(observer.observing())
            if self._replay is None:
                run(before_step)
            else:
                self._replay.run(number, key, stack.enter_context(replaying(before_step)))
        return {observer.statistic.name: observer.take() for observer in observers}

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The dense component, for a while."""
        pruned = [target for target in self.targets if target.name in self._originals]
        kept = [target.weight.detach().to("cpu", copy=True) for target in pruned]
        for target in pruned:
            target.weight.detach().copy_(self._originals[target.name])
        try:
            yield
        finally:
            for target, weight in zip(pruned, kept, strict=True):
                target.weight.detach().copy_(weight)

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
            self._originals[target.name] = target.weight.detach().to("cpu", copy=True)
        self._plan.statistics = statistics
        prune_targets(ready, self._plan)

    def close(self) -> None:
        """Make the component dense again."""
        for target in self.targets:
            if target.name in self._originals:
                target.weight.detach().copy_(self._originals[target.name])
        self._originals = {}
        self._replay = None
