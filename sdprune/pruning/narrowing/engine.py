"""Narrowing in one page: find the groups, count what stays, choose, refit, remove, report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.criteria.base import Ranking
from sdprune.pruning.criteria.sparsegpt import SparseGPT
from sdprune.pruning.narrowing.allocate import shared_out
from sdprune.pruning.narrowing.choose import Reader, by_score, greedily
from sdprune.pruning.narrowing.groups import Group, Slice, find_groups
from sdprune.pruning.narrowing.layers import Layer, drop_layers, find_layers
from sdprune.pruning.narrowing.refit import pair_name, refit
from sdprune.pruning.narrowing.spec import KINDS, NarrowSpec
from sdprune.pruning.plan import Statistics
from sdprune.pruning.prunable import require_prunable
from sdprune.pruning.statistics import statistic_class
from sdprune.pruning.statistics.layer_error import LayerError
from sdprune.pruning.statistics.removal_error import RemovalError
from sdprune.pruning.targets import Target, check_pattern, find_targets, matches

Units = Mapping[str, Tensor]
"""Numbers of the units that stay, ascending, by the name of the group; a whole layer is one unit."""
Layers = Mapping[str, Tensor]
"""A statistic by layer."""
LAYERS = ["Linear", "Conv2d"]


@dataclass(frozen=True)
class GroupReport:
    """What a module kept of its units; nothing where it is part of a layer that is dropped."""

    name: str
    kind: str
    units: int
    kept: int


@dataclass
class NarrowReport:
    """What happened to a component.

    `hash` is equal exactly when the same units stayed everywhere.
    """

    spec: dict[str, Any]
    parameters_before: int
    parameters: int
    groups: list[GroupReport] = field(default_factory=list)
    hash: str = ""

    @property
    def stock(self) -> bool:
        """Whether the component's configuration says all that is gone: then other libraries open what is left."""
        return all(one.kept in (0, one.units) for one in self.groups)

    def summary(self) -> dict[str, Any]:
        """The report as JSON, with units by kind in place of its groups."""
        kinds = {
            kind: {
                "units": sum(one.units for one in self.groups if one.kind == kind),
                "kept": sum(one.kept for one in self.groups if one.kind == kind),
            }
            for kind in KINDS
            if any(one.kind == kind for one in self.groups)
        }
        counts = {"parameters_before": self.parameters_before, "parameters": self.parameters}
        return {"spec": self.spec, "hash": self.hash, **counts, "kinds": kinds}

    def describe(self) -> dict[str, Any]:
        """The whole report as JSON."""
        return {**self.summary(), "groups": [asdict(one) for one in self.groups]}


def groups_of(component: nn.Module, spec: NarrowSpec) -> list[Group]:
    """The groups that a specification narrows.

    Raises:
        InputError: a kind that the component does not have, a pattern that matches nothing, or layers whose weights
            cannot be changed, by name.
    """
    if not spec.removes:
        return []
    found, layers = find_groups(component), find_layers(component)
    kinds: set[str] = {group.kind for group in found} | ({"layers"} if layers else set())
    has = f"it has {', '.join(sorted(kinds))}" if kinds else "it has nothing that can be narrowed"
    for kind, share in spec.shares.items():
        if kind not in kinds:
            raise InputError(f"{kind} is {share:g}, and a {type(component).__name__} has no {kind}: {has}.")
    if spec.flops and not found:
        raise InputError(f"flops is {spec.flops:g}, and of a {type(component).__name__} nothing can be removed: {has}.")
    found = [group for group in found if spec.flops or group.kind in spec.shares]
    names = [group.name for group in found] + [layer.name for layer in layers if spec.layers]
    for option, patterns in (("include", spec.include), ("exclude", spec.exclude)):
        for pattern in patterns:
            check_pattern(option, pattern, names, "modules that can be narrowed so")
    groups = [one for one in found if matches([one.name], spec.include) and not matches([one.name], spec.exclude)]
    parts = [(group, part) for group in groups for part in (*group.outputs, *group.inputs)]
    changed = dict.fromkeys(group.path(part) for group, part in parts if not _is_norm(group.layer(part)))
    require_prunable(component, find_targets(component, LAYERS, list(changed)) if changed else [])
    return groups


def layers_of(component: nn.Module, spec: NarrowSpec) -> list[Layer]:
    """The whole layers of which a specification drops a share; see `groups_of` for what it refuses."""
    found = find_layers(component) if spec.layers else []
    return [one for one in found if matches([one.name], spec.include) and not matches([one.name], spec.exclude)]


def dropped_layers(component: nn.Module, spec: NarrowSpec, errors: Optional[Layers] = None) -> list[str]:
    """Names of the layers that are dropped: those without which, each alone, outputs change least.

    Args:
        component: dense.
        spec: what to remove.
        errors: the statistic `layer_error`, by the first Linear layer of each.
    """
    layers = layers_of(component, spec)
    lost = {one.name: float(_found(errors or {}, LayerError.name, one.key, one.name)[0]) for one in layers}
    order = sorted(lost, key=lambda name: (math.isnan(lost[name]), lost[name]))
    return order[: int(spec.layers * len(layers) + 0.5)]


def choose(component: nn.Module, spec: NarrowSpec, statistics: Optional[Statistics] = None) -> Units:
    """Decide which units of a dense component stay.

    Args:
        component: a text encoder, a U-Net or any other module with such groups.
        spec: what to remove and how; shares of 0 touch nothing.
        statistics: those that the criterion names, of the layers that read units, as in `sdprune.pruning.apply`.

    Raises:
        InputError: see `groups_of`; missing statistics, by the layer.
    """
    groups = groups_of(component, spec)
    dropped = dropped_layers(component, spec, (statistics or {}).get(LayerError.name))
    found = {one.name: torch.arange(one.name not in dropped) for one in layers_of(component, spec)}
    counts = counts_of(groups, spec, (statistics or {}).get(RemovalError.name))
    for group in groups:
        found[group.name] = torch.arange(group.units)
        if counts[group.name] < group.units:
            readers = [reader_of(group, one, spec, statistics or {}) for one in group.inputs]
            found[group.name] = next(kept_of(group, readers, spec, [counts[group.name]])).cpu()
    return found


def counts_of(groups: Sequence[Group], spec: NarrowSpec, errors: Optional[Layers] = None) -> dict[str, int]:
    """How many units of each group stay, by its name.

    Args:
        groups: of a component.
        spec: what to remove.
        errors: the statistic `removal_error`, by the layers that read units, where measurement decides.
    """
    if not spec.flops:
        return {group.name: group.kept(spec.shares[group.kind]) for group in groups}
    names = {group.name: group.path(group.inputs[0]) for group in groups}
    return shared_out(
        groups, {name: _found(errors or {}, RemovalError.name, one, one) for name, one in names.items()}, spec.flops
    )


def kept_of(group: Group, readers: Sequence[Reader], spec: NarrowSpec, counts: Sequence[int]) -> Iterator[Tensor]:
    """The units of a group that stay at each of some counts, descending."""
    if isinstance(spec.criterion, SparseGPT):
        yield from greedily(readers, spec.criterion.damping, group.parts, counts)
    else:
        assert isinstance(spec.criterion, Ranking)
        yield from (by_score(readers, spec.criterion, group.parts, count) for count in counts)


def narrow(component: nn.Module, spec: NarrowSpec, units: Units, pairs: Optional[Layers] = None) -> NarrowReport:
    """Narrow a component in place.

    Args:
        component: dense.
        spec: what to remove and how.
        units: those that stay, by group, see `choose`.
        pairs: where layers are refitted, the Hessian of each pair by its name, see `pairing`.

    Raises:
        InputError: a pair is missing, by the layer.
    """
    before, digest = _size(component), hashlib.sha256()
    report = NarrowReport(spec.describe(), before, before)
    layers, groups = [one.name for one in layers_of(component, spec)], groups_of(component, spec)
    dropped = [name for name in layers if not len(units[name])]
    for name in layers:
        report.groups.append(GroupReport(name, "layers", 1, len(units[name])))
        digest.update(f"{name} layers {units[name].tolist()}".encode())
    for group in groups:
        inside = any(f"{group.name}.".startswith(f"{name}.") for name in dropped)
        kept = units[group.name][: 0 if inside else None]
        report.groups.append(GroupReport(group.name, group.kind, group.units, len(kept)))
        digest.update(f"{group.name} {group.kind} {kept.tolist()}".encode())
        if inside or len(kept) == group.units:
            continue
        group.keep(kept)
        for part in group.inputs if spec.refit else ():
            hessian = _found(pairs or {}, "hessian", pair_name(group, part), group.path(part))
            refit(group.layer(part), hessian[0], spec.damping)
    drop_layers(component, dropped)
    report.parameters, report.hash = _size(component), digest.hexdigest()
    return report


def narrow_shapes(component: nn.Module, spec: NarrowSpec, statistics: Statistics) -> None:
    """Give a component on the meta device the shapes that it will have; `statistics` as in `choose`."""
    groups = groups_of(component, spec)
    counts = counts_of(groups, spec, statistics.get(RemovalError.name))
    dropped = dropped_layers(component, spec, statistics.get(LayerError.name))
    for group in groups:
        group.keep(torch.arange(counts[group.name]))
    drop_layers(component, dropped)


def reader_of(group: Group, part: Slice, spec: NarrowSpec, statistics: Statistics) -> Reader:
    """A layer that reads the units of a group, with what the choice reads of it."""
    target = Target(group.path(part), group.layer(part), "")
    values = {name: _read(statistics, name, target, spec) for name in spec.statistics}
    kernel = target.shape[1] // target.channels
    width, device = part.width * kernel, target.weight.device
    columns = part.offset * kernel + torch.arange(group.units * width, device=device).view(group.units, width)
    return Reader(target, columns, values)


def _read(statistics: Statistics, name: str, target: Target, spec: NarrowSpec) -> Tensor:
    stored = _found(statistics.get(name, {}), name, target.name, target.name)
    found = statistic_class(name).read(target.name, stored, spec.timesteps)
    return found.to(target.weight.device)[0]  # neither Linear nor these convolutions are grouped


def _found(layers: Layers, statistic: str, key: str, layer: str) -> Tensor:
    if key not in layers:
        raise InputError(
            f"Statistic {statistic} of layer {layer!r} is missing: calibration never ran the layer, or was of another "
            "model. Gather it again."
        )
    return layers[key]


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.GroupNorm)


def _size(component: nn.Module) -> int:
    return sum(parameter.numel() for parameter in component.parameters())
