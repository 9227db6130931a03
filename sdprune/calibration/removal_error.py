"""Measuring what a component loses when one module of it alone loses units, or one layer of it is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sdprune.calibration.execution import evaluating
from sdprune.calibration.pruned_error import Measurement
from sdprune.pruning import Statistics, Target, find_targets
from sdprune.pruning.narrowing import Group, NarrowSpec, drop_layers, groups_of, layers_of
from sdprune.pruning.narrowing.choose import silenced
from sdprune.pruning.narrowing.engine import kept_of, reader_of
from sdprune.pruning.statistics.pruned_error import Probe


class RemovalMeasurement(Measurement):
    """Silences units of the modules of a dense component, one module at a time: see `RemovalError`.

    Units are not cut out but ignored by the layer that reads them, so that nothing else changes. A norm before this
    layer still sees them.

    Args:
        component: the module.
        spec: how it is to be narrowed.
        statistics: of the layers that read units, as the choice of units reads them.
        probe: at which shares of the units.
        run: runs the component on fixed inputs; its output, [samples, n].
    """

    def __init__(
        self, component: nn.Module, spec: NarrowSpec, statistics: Statistics, probe: Probe, run: Callable[[], Tensor]
    ) -> None:
        self.component, self.narrow, self.statistics, self.probe, self._run = component, spec, statistics, probe, run
        self.groups = {group.path(group.inputs[0]): group for group in groups_of(component, spec)}
        self.units = {
            name: [Target(group.path(part), group.layer(part), "") for part in group.inputs]
            for name, group in self.groups.items()
        }
        self._flops: Mapping[str, int] = {}
        """See `_flops_of`."""

    def _output(self) -> Tensor:
        if self._flops:
            return super()._output()
        calls: list[Any] = []
        handle = self.component.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        try:
            found = super()._output()
        finally:
            handle.remove()
        with evaluating(self.component):
            self._flops = _flops_of(self.component, *calls[0])
        return found

    def _of(self, members: Sequence[Target], dense: Tensor) -> Tensor:
        group = self.groups[members[0].name]
        shares = torch.tensor([1 - count / group.units for count in self._counts(group)], dtype=torch.float64)
        return torch.stack([shares, shares * self._saves(group), super()._of(members, dense)], 1)

    def _counts(self, group: Group) -> list[int]:
        """How many units stay at each level."""
        return sorted({group.kept(level) for level in self.probe.levels} - {group.units}, reverse=True)

    def _saves(self, group: Group) -> float:
        """Which share of the component's FLOPs goes with all units of a group."""
        layers = {part.layer for part in (*group.outputs, *group.inputs)}
        others = [name for name, one in group.module.named_modules() if not any(one.children()) and name not in layers]
        flops = self._flops.get(group.name, 0) - sum(self._flops.get(f"{group.name}.{name}", 0) for name in others)
        return flops / self._flops[""]

    def _changes(self, members: Sequence[Target]) -> Iterator[Callable[[], object]]:
        group = self.groups[members[0].name]
        readers = [reader_of(group, part, self.narrow, self.statistics) for part in group.inputs]
        for kept in kept_of(group, readers, self.narrow, self._counts(group)):
            yield partial(self._silence, readers, kept)

    def _silence(self, readers: Sequence[Any], kept: Tensor) -> None:
        for reader in readers:
            found = silenced(reader, kept, self.narrow.damping if self.narrow.refit else None)
            reader.target.write(found == 0, found)


class LayerMeasurement(Measurement):
    """Drops the layers of a dense component, one at a time: see `LayerError`.

    Args:
        component: the module.
        spec: says which layers may be dropped.
        run: runs the component on fixed inputs; what is made of its output, [samples, n].
    """

    def __init__(self, component: nn.Module, spec: NarrowSpec, run: Callable[[], Tensor]) -> None:
        self.component, self._run = component, run
        self.names = {one.key: one.name for one in layers_of(component, spec)}
        targets = find_targets(component, ["Linear"], list(self.names))
        self.units = {one.name: [one] for one in targets}

    def _of(self, members: Sequence[Target], dense: Tensor) -> Tensor:
        put_back = drop_layers(self.component, [self.names[members[0].name]])
        try:
            return torch.tensor([self._error(dense)], dtype=torch.float64)
        finally:
            put_back()


def _flops_of(component: nn.Module, args: Any, kwargs: Any) -> dict[str, int]:
    """FLOPs of one call, by name of the module; those of the component have no name."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        component(*args, **kwargs)
    root = type(component).__name__
    counts = {f"{name}.": sum(one.values()) for name, one in counter.get_flop_counts().items()}
    return {name[len(root) + 1 : -1]: one for name, one in counts.items() if name.startswith(f"{root}.")}


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of the attention that torch computes on CPUs, counted like those that it computes elsewhere."""
    return sdpa_flop_count(query, key, value)


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
