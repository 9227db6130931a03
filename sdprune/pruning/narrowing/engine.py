"""Narrowing in one page: find the groups, count what stays, choose, refit, remove, report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.criteria.base import Ranking
from sdprune.pruning.criteria.sparsegpt import SparseGPT
from sdprune.pruning.narrowing.choose import Reader, by_score, greedy, refitted
from sdprune.pruning.narrowing.groups import Group, Slice, find_groups
from sdprune.pruning.narrowing.spec import KINDS, NarrowSpec
from sdprune.pruning.plan import Statistics
from sdprune.pruning.prunable import require_prunable
from sdprune.pruning.statistics import statistic_class
from sdprune.pruning.targets import Target, find_targets


@dataclass(frozen=True)
class GroupReport:
    """What a module kept of its units."""

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

    def summary(self) -> dict[str, Any]:
        """The report as JSON, with units by kind in place of its groups."""
        kinds = {
            kind: {
                "units": sum(one.units for one in self.groups if one.kind == kind),
                "kept": sum(one.kept for one in self.groups if one.kind == kind),
            }
            for kind in KINDS
            if kind in self.spec
        }
        counts = {"parameters_before": self.parameters_before, "parameters": self.parameters}
        return {"spec": self.spec, "hash": self.hash, **counts, "kinds": kinds}

    def describe(self) -> dict[str, Any]:
        """The whole report as JSON."""
        return {**self.summary(), "groups": [asdict(one) for one in self.groups]}


def groups_of(component: nn.Module, spec: NarrowSpec) -> list[Group]:
    """The groups that a specification narrows.

    Raises:
        InputError: a kind that the component does not have, or layers whose weights cannot be changed, by name.
    """
    if not spec.shares:
        return []
    found = find_groups(component)
    kinds = {group.kind for group in found}
    for kind, share in spec.shares.items():
        if kind not in kinds:
            has = f"it has {', '.join(sorted(kinds))}" if kinds else "it has nothing that can be narrowed"
            raise InputError(f"{kind} is {share:g}, and a {type(component).__name__} has no {kind}: {has}.")
    groups = [group for group in found if group.kind in spec.shares]
    names = [name for group in groups for name, one in group.layers(component).items() if not _is_norm(one)]
    require_prunable(component, find_targets(component, ["Linear", "Conv2d"], names))
    return groups


@torch.no_grad()
def narrow(component: nn.Module, spec: NarrowSpec, statistics: Optional[Statistics] = None) -> NarrowReport:
    """Narrow a component in place.

    Args:
        component: a text encoder, a U-Net or any other module with such groups.
        spec: what to remove and how; shares of 0 touch nothing.
        statistics: of the inputs of the layers that read units, as in `sdprune.pruning.apply`.

    Raises:
        InputError: see `groups_of`; missing statistics, by the layer.
    """
    groups, before = groups_of(component, spec), _size(component)
    report, digest = NarrowReport(spec.describe(), before, before), hashlib.sha256()
    for group in groups:
        count = group.kept(spec.shares[group.kind])
        units = _narrow(component, group, count, spec, statistics or {})
        report.groups.append(GroupReport(group.name, group.kind, group.units, count))
        digest.update(f"{group.name} {group.kind} {units.tolist()}".encode())
    report.parameters, report.hash = _size(component), digest.hexdigest()
    return report


def narrow_shapes(component: nn.Module, spec: NarrowSpec) -> None:
    """Give a component on the meta device the shapes that it will have: counts depend on no number."""
    for group in groups_of(component, spec):
        group.keep(component, torch.arange(group.kept(spec.shares[group.kind])))


def _narrow(component: nn.Module, group: Group, count: int, spec: NarrowSpec, statistics: Statistics) -> Tensor:
    """Narrow one group, and return the units that stay."""
    if count == group.units:
        return torch.arange(count)
    readers = [_reader(component, one, group.units, spec, statistics) for one in group.inputs]
    if isinstance(spec.criterion, SparseGPT):
        units = greedy(readers, spec.criterion.damping, group.parts, count)
    else:
        assert isinstance(spec.criterion, Ranking)
        units = by_score(readers, spec.criterion, group.parts, count)
    new = [refitted(one, units, spec.damping) for one in readers] if spec.refit else []
    group.keep(component, units)
    for reader, weight in zip(readers, new, strict=False):
        stored = reader.target.weight
        stored.copy_(weight.view(stored.shape))
    return units.cpu()


def _reader(component: nn.Module, part: Slice, units: int, spec: NarrowSpec, statistics: Statistics) -> Reader:
    (target,) = find_targets(component, ["Linear", "Conv2d"], [part.layer])
    values = {name: _read(statistics, name, target, spec) for name in spec.statistics}
    kernel = target.shape[1] // target.channels
    width = part.width * kernel
    device = target.weight.device
    columns = part.offset * kernel + torch.arange(units * width, device=device).view(units, width)
    return Reader(target, columns, values)


def _read(statistics: Statistics, name: str, target: Target, spec: NarrowSpec) -> Tensor:
    layers: Mapping[str, Tensor] = statistics.get(name, {})
    if target.name not in layers:
        raise InputError(
            f"Statistic {name} of layer {target.name!r} is missing: calibration never ran the layer, or was of another "
            "model. Gather it again."
        )
    found = statistic_class(name).read(target.name, layers[target.name], spec.timesteps)
    return found.to(target.weight.device)[0]  # neither Linear nor these convolutions are grouped


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.GroupNorm)


def _size(component: nn.Module) -> int:
    return sum(parameter.numel() for parameter in component.parameters())
