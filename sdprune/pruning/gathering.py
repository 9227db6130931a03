"""Which layers are listened to in which pass over the calibration batches: all, a package of them, or a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sdprune.errors import InputError, unknown
from sdprune.pruning.calls import Call, calls_of
from sdprune.pruning.engine import prune_targets, targets_of
from sdprune.pruning.execution import evaluating, order_of_calls, stages
from sdprune.pruning.plan import Plan, Statistics
from sdprune.pruning.replay import Replay
from sdprune.pruning.spec import PruneSpec
from sdprune.pruning.statistics import STATISTICS, Hessian, InputNorm, Listener, Statistic, Sums, Timesteps, Totals
from sdprune.pruning.statistics import timestep_weights as weights_of
from sdprune.pruning.targets import Target

HESSIAN_BYTES = 8 << 30


def statistic(name: str, steps: int = 1, timesteps: Timesteps = "uniform") -> Statistic:
    """A statistic by name, over so many denoising steps; input norms keep the steps apart and are weighted later.

    Raises:
        InputError: for an unknown name.
    """
    if name not in STATISTICS:
        raise unknown("statistic", name, STATISTICS)
    return Hessian(weights_of(timesteps, steps)) if name == "hessian" else InputNorm(steps)


class Gathering:
    """Gathers statistics of one component, in one or more passes over the same batches.

    All statistics of the dense model take one pass, and Hessians that do not fit into memory together more. In
    sequential order the layers are gathered stage by stage, as they run, and pruned at the end of their stage, so that
    what a pass gathers depends on the passes before. Layers that are ranked together in spite of being in several
    stages, as the stem's are by granularity module_block, are pruned at the end of the last of these.

    The component is in evaluation mode while it runs.

    Args:
        component: the module, dense.
        targets: the layers.
        statistics: what to gather of each.
        spec: in sequential order, how layers are pruned at the end of their stage.
        order: in sequential order, see `order_of_calls`.
        dense_statistics: what the allocation of `spec` reads.
        replay: whether the component is a plain chain of blocks, as text encoders are. A pass then runs no more than
            two of them, on what the one before gave.
        hessian_bytes: for the Hessians that are gathered in one pass: a sum over the running batch and one over all.

    Raises:
        InputError: a single layer's Hessian exceeds the memory.
    """

    def __init__(
        self,
        component: nn.Module,
        targets: Sequence[Target],
        statistics: Sequence[Statistic],
        spec: Optional[PruneSpec] = None,
        order: Sequence[str] = (),
        dense_statistics: Optional[Statistics] = None,
        replay: bool = False,
        hessian_bytes: int = HESSIAN_BYTES,
    ) -> None:
        self.component = component
        self.statistics = {one.name: one for one in statistics}
        self.targets = list(targets)
        self._stages = stages(targets, order) if spec else [self.targets]
        self.plan = Plan(targets, spec, {}, dense_statistics or {}) if spec else None
        self.replay = Replay(component, self._stages) if spec and replay else None
        self._gathered: set[str] = set()  # layers whose stage has ended
        self._waiting = list(self.plan.groups(targets).values()) if self.plan else []  # for the rest of their group
        self._originals: dict[str, Tensor] = {}
        self.passes: list[list[tuple[Statistic, list[Target]]]] = []
        self._stage_ends: dict[int, list[Target]] = {}
        for stage in self._stages:
            self.passes += _passes(stage, statistics, hessian_bytes)
            self._stage_ends[len(self.passes) - 1] = stage

    def visit(
        self, number: int, key: int, run: Callable[[Sequence[Listener]], Any], set_up: Callable[[Listener], None]
    ) -> dict[str, Sums]:
        """Run one batch and return its sums by statistic.

        Args:
            number: of the pass.
            key: of the batch; the same in every pass.
            run: runs the component on the batch; it may set the listeners' step.
            set_up: tells each listener what of the batch counts.
        """
        listeners = [Listener(targets, one) for one, targets in self.passes[number]]
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.component))
            for listener in listeners:
                set_up(listener)
                stack.enter_context(listener.listening())
            if self.replay is None:
                run(listeners)
            else:
                self.replay.run(key, listeners, lambda: run(listeners))
        return {listener.statistic.name: listener.take() for listener in listeners}

    def empty(self, number: int) -> Iterator[tuple[str, Target, Callable[[], Tensor]]]:
        """The sums of a pass, (statistic, layer, zeros), in an order that all processes share."""
        for one, targets in self.passes[number]:
            for target in targets:
                yield one.name, target, lambda one=one, target=target: one.empty(target)  # type: ignore[misc]

    def finish(self, number: int, statistics: Statistics) -> None:
        """A pass has been over all batches: in sequential order its layers are pruned now.

        Args:
            number: of the pass.
            statistics: of all layers so far, by statistic, then by layer.
        """
        if self.plan is None or number not in self._stage_ends:
            return
        self._gathered |= {target.name for target in self._stage_ends[number]}
        ready = [group for group in self._waiting if self._gathered.issuperset(target.name for target in group)]
        self._waiting = [group for group in self._waiting if group not in ready]
        spec, self.plan.statistics = self.plan.spec, statistics
        # What calibration never runs is reported when the component is pruned; here it stays as it is.
        heard = [
            target for group in ready if all(_all_there(one, spec, statistics) for one in group) for target in group
        ]
        for target in heard:
            self._originals[target.name] = target.weight.detach().clone()
        prune_targets(heard, self.plan)

    def close(self) -> None:
        """Make the component dense again."""
        for target in self.targets:
            if target.name in self._originals:
                target.weight.detach().copy_(self._originals[target.name])
        self._originals = {}
        if self.replay is not None:
            self.replay.outputs = {}


def count_passes(
    targets: Sequence[Target],
    statistics: Sequence[Statistic],
    order: Optional[Sequence[str]] = None,
    hessian_bytes: int = HESSIAN_BYTES,
) -> int:
    """How many passes a gathering takes, known before it can begin; in sequential order by the order of the layers."""
    parts = [targets] if order is None else stages(targets, order)
    return sum(len(_passes(part, statistics, hessian_bytes)) for part in parts)


def gather(
    component: nn.Module,
    inputs: Iterable[Any],
    spec: PruneSpec,
    names: Iterable[str] | str,
    dense: Optional[Statistics] = None,
) -> dict[str, dict[str, Tensor]]:
    """Statistics of a module's layers from inputs to the module, by name, then by layer.

    The module runs in evaluation mode.

    Args:
        component: any module, dense; it is dense again afterwards.
        inputs: each element is the input of one call: a tensor, a tuple of arguments, a dict of keyword arguments, or
            both as (tuple, dict). The first axis of the first tensor in it counts samples.
        spec: says which layers, and in sequential order how they are pruned.
        names: of the statistics, or the name of one.
        dense: in sequential order, what the allocation reads.

    Raises:
        InputError: for inputs that `forward` does not take, or none.
    """
    batches = calls_of(component, inputs)
    targets = targets_of(component, spec)
    wanted = [statistic(name) for name in sorted([names] if isinstance(names, str) else names)]
    if spec.sequential:
        order = order_of_calls(component, targets, partial(_call, component, batches[0], ()))
        # Without knowing the module's structure every pass runs all of it.
        gathering = Gathering(component, targets, wanted, spec, order, dense)
    else:
        gathering = Gathering(component, targets, wanted)
    gathered: dict[str, dict[str, Tensor]] = {name: {} for name in gathering.statistics}
    try:
        for number in range(len(gathering.passes)):
            totals = {name: Totals(one) for name, one in gathering.statistics.items()}
            for key, batch in enumerate(batches):
                sums = gathering.visit(number, key, partial(_call, component, batch), lambda _: None)
                for name, own in sums.items():
                    totals[name].samples += batch.samples
                    for layer, value in own.totals.items():
                        totals[name].add(layer, value)
            for name, total in totals.items():
                gathered[name] |= total.finish() if total.sums else {}
            gathering.finish(number, gathered)
    finally:
        gathering.close()
    return gathered


@torch.no_grad()
def _call(component: nn.Module, call: Call, listeners: Sequence[Listener]) -> None:
    component(*call.args, **call.kwargs)


def _passes(
    targets: Sequence[Target], statistics: Sequence[Statistic], limit: int
) -> list[list[tuple[Statistic, list[Target]]]]:
    """Everything in one pass, but for Hessians that do not fit."""
    small: list[tuple[Statistic, list[Target]]] = [
        (one, list(targets)) for one in statistics if not isinstance(one, Hessian)
    ]
    packages: list[tuple[Statistic, list[Target]]] = []
    for one in statistics:
        packages += [(one, package) for package in _packages(targets, limit)] if isinstance(one, Hessian) else []
    return [[*small, *packages[:1]], *([package] for package in packages[1:])]


def _packages(targets: Sequence[Target], limit: int) -> list[list[Target]]:
    packages: list[list[Target]] = []
    left = 0
    for target in targets:
        size = 8 * Hessian.numel(target)  # fp32, of the batch and in all
        if size > limit:
            raise InputError(
                f"The Hessian of layer {target.name!r} takes {size / 2**30:.1f} GiB, more than the "
                f"{limit / 2**30:.1f} GiB it may: raise the limit, or exclude the layer."
            )
        if size > left:
            packages.append([])
            left = limit
        packages[-1].append(target)
        left -= size
    return packages


def _all_there(target: Target, spec: PruneSpec, statistics: Statistics) -> bool:
    return all(target.name in statistics.get(name, {}) for name in spec.criterion.statistics)
