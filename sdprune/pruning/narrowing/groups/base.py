"""What a group is: units that can be removed one by one, with every parameter that belongs to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isabstract
from math import lcm
from typing import Any, ClassVar, Literal, Optional

import torch
from torch import Tensor, nn

from sdprune.schema import descendants

Kind = Literal["heads", "neurons", "channels", "layers"]


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie along one axis of a layer: unit u has `width` places from offset + u * width.

    Args:
        layer: its name in the module of the group.
        offset: the place of unit 0.
        width: places of a unit.
    """

    layer: str
    offset: int = 0
    width: int = 1

    def places(self, units: Tensor) -> Tensor:
        """Places of some units, in the order of the units."""
        return (self.offset + units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()


@dataclass(frozen=True)
class Group:
    """Units of one module that can be removed one by one, without a trace outside of it.

    Args:
        kind: what a unit is.
        name: of the module, in the component.
        module: holds all layers of the group.
        units: how many there are.
        outputs: the layers that make the units: their rows. A layer may stand here twice, as one that makes a value and
            a gate.
        inputs: the layers that read the units: their columns.
        parts: units lie in so many equal runs, such as those of a GroupNorm, that have to stay equal.
        multiple: fast kernels want the number of units to be divisible by it, as far as it is now.
        counts: attributes of the module that count units, with the count of one unit.
    """

    kind: Kind
    name: str
    module: nn.Module
    units: int
    outputs: tuple[Slice, ...]
    inputs: tuple[Slice, ...]
    parts: int = 1
    multiple: int = 1
    counts: Mapping[str, int] = field(default_factory=dict)

    def kept(self, share: float) -> int:
        """How many units stay when a share is removed: the nearest possible number, and at least the smallest one."""
        return max(1, int(self.units * (1 - share) / self.step + 0.5)) * self.step

    @property
    def step(self) -> int:
        """How many units are removed together."""
        return lcm(self.parts, self.multiple if self.units % self.multiple == 0 else 1)

    def path(self, part: Slice) -> str:
        """Name of a layer in the component."""
        return f"{self.name}.{part.layer}".lstrip(".")

    def layer(self, part: Slice) -> Any:
        """A layer."""
        return self.module.get_submodule(part.layer)

    @torch.no_grad()
    def keep(self, units: Tensor) -> None:
        """Remove all other units.

        Args:
            units: numbers of those that stay, ascending.
        """
        for axis, slices in ((0, self.outputs), (1, self.inputs)):
            for name in dict.fromkeys(one.layer for one in slices):
                layer = self.module.get_submodule(name)
                places = torch.cat([one.places(units) for one in slices if one.layer == name])
                _take(layer, axis, places)
        for attribute, width in self.counts.items():
            setattr(self.module, attribute, width * len(units))


class Grouping(ABC):
    """Finds groups of one kind. A subclass is one file in this folder; none of them goes by the name of one model."""

    kind: ClassVar[Kind]

    @abstractmethod
    def find(self, name: str, module: nn.Module) -> Optional[Group]:
        """The group of a module, if it has the structure; `name` is the module's in the component."""


def find_groups(component: nn.Module, kinds: Sequence[str] = ()) -> list[Group]:
    """The groups of a component in the order of its modules; of all kinds, or of some."""
    classes: list[Any] = [cls for cls in descendants(Grouping) if not isabstract(cls)]
    groupings = [cls() for cls in sorted(classes, key=lambda cls: cls.__name__) if not kinds or cls.kind in kinds]
    found = []
    for name, module in component.named_modules():
        groups = (grouping.find(name, module) for grouping in groupings)
        found += [group for group in groups if group is not None]
    return found


_WIDTHS = {
    nn.Linear: ("out_features", "in_features"), nn.Conv2d: ("out_channels", "in_channels"),
    nn.GroupNorm: ("num_channels",),
}  # fmt: skip


def _take(layer: nn.Module, axis: int, places: Tensor) -> None:
    """Keep some rows (axis 0) or columns (axis 1) of a layer."""
    for name in ("weight", "bias")[: 2 - axis]:
        old = getattr(layer, name, None)
        if old is not None:
            new = old.detach().index_select(axis, places.to(old.device)).contiguous()
            setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
    widths = next(names for kind, names in _WIDTHS.items() if isinstance(layer, kind))
    setattr(layer, widths[axis], len(places))
