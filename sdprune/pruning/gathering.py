"""Which layers are listened to in which pass over the calibration batches: all, a package of them, or a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.engine import prune_targets, targets_of
from sdprune.pruning.plan import Plan, Statistics
from sdprune.pruning.replay import Replay
from sdprune.pruning.spec import PruneSpec
from sdprune.pruning.statistics import Hessian, InputNorm, Listener, Statistic, Sums, Timesteps, Totals
from sdprune.pruning.statistics import timestep_weights as weights_of
from sdprune.pruning.targets import Target, by_block

HESSIAN_BYTES = 8 << 30


def statistic(name: str, steps: int = 1, timesteps: Timesteps = "uniform") -> Statistic:
    """A statistic by name, over so many denoising steps; input norms keep the steps apart and are weighted later."""
    return Hessian(weights_of(timesteps, steps)) if name == "hessian" else InputNorm(steps)


class Gathering:
    """Gathers statistics of one component, in one or more passes over the same batches.

    All statistics of the dense model take one pass, and Hessians that do not fit into memory together more. In
    sequential order every block is a pass and pruned at its end; what a pass gathers then depends on the passes before.

    Args:
        component: the module, dense.
        targets: the layers.
        statistics: what to gather of each.
        spec: in sequential order, how each block is pruned at the end of its pass.
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
        dense_statistics: Optional[Statistics] = None,
        replay: bool = False,
        hessian_bytes: int = HESSIAN_BYTES,
    ) -> None:
        self.statistics = {one.name: one for one in statistics}
        self.targets = list(targets)
        self.plan = Plan(targets, spec, {}, dense_statistics or {}) if spec else None
        self.replay = Replay(component, targets) if spec and replay else None
        self._originals: dict[str, Tensor] = {}
        stages = list(by_block(targets).values()) if spec else [self.targets]
        self.passes: list[list[tuple[Statistic, list[Target]]]] = []
        self._stage_ends: dict[int, list[Target]] = {}
        for stage in stages:
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
        """A pass has been over all batches: in sequential order its block is pruned now.

        Args:
            number: of the pass.
            statistics: of all layers so far, by statistic, then by layer.
        """
        stage = self._stage_ends.get(number)
        if self.plan is None or stage is None:
            return
        for target in stage:
            self._originals[target.name] = target.weight.detach().clone()
        self.plan.statistics = statistics
        prune_targets([target for target in stage if _all_there(target, self.plan.spec, statistics)], self.plan)

    def close(self) -> None:
        """Make the component dense again."""
        for target in self.targets:
            if target.name in self._originals:
                target.weight.data.copy_(self._originals[target.name])
        self._originals = {}
        if self.replay is not None:
            self.replay.outputs = {}


def count_passes(
    targets: Sequence[Target], statistics: Sequence[Statistic], sequential: bool, hessian_bytes: int = HESSIAN_BYTES
) -> int:
    """How many passes a gathering takes, known before it can begin."""
    stages = list(by_block(targets).values()) if sequential else [targets]
    return sum(len(_passes(stage, statistics, hessian_bytes)) for stage in stages)


def gather(
    component: nn.Module,
    inputs: Iterable[Any],
    spec: PruneSpec,
    names: Iterable[str],
    dense: Optional[Statistics] = None,
) -> dict[str, dict[str, Tensor]]:
    """Statistics of a module's layers from inputs to the module, by name, then by layer.

    Args:
        component: any module, dense; it is dense again afterwards.
        inputs: each element is one call's input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        spec: says which layers, and in sequential order how they are pruned.
        names: of the statistics.
        dense: in sequential order, what the allocation reads.
    """
    batches = list(inputs)
    targets = targets_of(component, spec)
    # Without knowing the module's structure every pass runs all of it.
    gathering = Gathering(
        component, targets, [statistic(name) for name in sorted(names)], spec if spec.sequential else None, dense
    )
    gathered: dict[str, dict[str, Tensor]] = {name: {} for name in gathering.statistics}
    try:
        for number in range(len(gathering.passes)):
            totals = {name: Totals(one) for name, one in gathering.statistics.items()}
            for key, batch in enumerate(batches):
                sums = gathering.visit(number, key, partial(_call, component, batch), lambda _: None)
                for name, own in sums.items():
                    totals[name].samples += _items(batch)
                    for layer, value in own.totals.items():
                        totals[name].add(layer, value)
            for name, total in totals.items():
                gathered[name] |= total.finish() if total.sums else {}
            gathering.finish(number, gathered)
    finally:
        gathering.close()
    return gathered


@torch.no_grad()
def _call(component: nn.Module, batch: Any, listeners: Sequence[Listener]) -> None:
    if isinstance(batch, Mapping):
        component(**batch)
    elif isinstance(batch, (tuple, list)):
        component(*batch)
    else:
        component(batch)


def _items(batch: Any) -> int:
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
    first = first[0] if isinstance(first, (tuple, list)) else first
    return len(first) if isinstance(first, Tensor) and first.dim() else 1


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
