"""What every granularity is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from torch import Tensor

from sdprune.pruning.selection import Layer, count, select, split
from sdprune.pruning.targets import Target


@dataclass(frozen=True)
class Quota:
    """How much a group of layers loses: its k lowest weights or, with a band, the ranks between two shares."""

    k: int
    band: Optional[tuple[float, float]] = None

    def ranks(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """For each part of the group, of these sizes, the first rank that is pruned and the one past the last."""
        if self.band is None:
            return [0] * len(sizes), split(self.k, sizes)
        low, high = self.band
        return [count(size, low) for size in sizes], [count(size, high) for size in sizes]


class Granularity(ABC):
    """Which weights are ranked against each other: all those of a group of layers, unless a subclass says otherwise.

    A subclass is one file in this folder. It can be made without arguments, or overrides `read`.
    """

    name: ClassVar[str]
    """What configurations and criteria call it; by default the name of the class."""

    sparsity: Optional[float] = None
    """The share that is pruned, where the granularity decides it."""

    whole_component: ClassVar[bool] = False
    """Whether all layers are ranked together: then no allocation has an effect, and there is no sequential order."""

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name", cls.__name__)

    @classmethod
    def read(cls, text: str, block_width: int) -> Optional["Granularity"]:
        """The granularity that a configuration names by this text; None if it is another one."""
        return cls() if text == cls.name else None

    def group(self, target: Target) -> str:
        """The group of a layer: layers of one group are ranked together."""
        return target.name

    def masks(self, layers: Sequence[Layer], quota: Quota) -> Iterator[Tensor]:
        """Select from the scores of one group of layers.

        Yields:
            Each layer's mask, bool [rows, columns], True = pruned. A layer's weights may be changed once it is out.
        """
        (low,), (high,) = quota.ranks([sum(layer.target.weight.numel() for layer in layers)])
        return select(layers, low, high)


class WithinLayer(Granularity):
    """Ranks parts of a layer, each by itself."""

    def masks(self, layers: Sequence[Layer], quota: Quota) -> Iterator[Tensor]:  # noqa: D102
        return (self.mask(layer.target, layer.parts[0](), quota) for layer in layers)

    @abstractmethod
    def mask(self, target: Target, scores: Tensor, quota: Quota) -> Tensor:
        """Select from the scores [rows, columns] of a layer the ranks that `quota.ranks` gives each of its parts.

        Returns:
            Bool [rows, columns], True = pruned.
        """


class ColumnWise(WithinLayer):
    """Ranks stretches of neighbouring columns, so that a Reconstruction can prune one after the other."""

    def order(self, target: Target) -> Any:
        """An index that puts the columns into their order."""
        return slice(None)

    @abstractmethod
    def widths(self, target: Target) -> list[int]:
        """The widths of the stretches, in that order."""

    @abstractmethod
    def pick(self, name: str, scores: Tensor, k: int) -> Tensor:
        """Select from the scores of one stretch of the layer so named; k of its weights are due by the quota."""
