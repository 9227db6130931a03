"""What every statistic is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import isabstract
from typing import Any, ClassVar

from torch import Tensor

from sdprune.errors import InputError, unknown
from sdprune.pruning.targets import Target
from sdprune.pruning.timesteps import Timesteps
from sdprune.schema import descendants, is_packaged


class Statistic(ABC):
    """Numbers on a layer that criteria and allocations read; they name it, and the store keeps it."""

    name: ClassVar[str]

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:
        """What criteria and allocations get of a stored statistic, in its own dtype or float32.

        Raises:
            InputError: a shape that this statistic never has, naming the layer.
        """
        return stored

    @classmethod
    def require_axes(cls, layer: str, stored: Tensor, *axes: str) -> None:
        """Raise InputError, naming the layer, unless a stored statistic has so many axes."""
        if stored.dim() != len(axes):
            raise InputError(
                f"Statistic {cls.name} of layer {layer!r} has shape {list(stored.shape)}, not [{', '.join(axes)}]: "
                "gather it with sdprune.gather."
            )


class InputStatistic(Statistic):
    """A sum over a layer's inputs, batch by batch.

    A subclass is one file in this folder.

    Args:
        steps: number of denoising steps that a component runs; 1 for text encoders.
        timesteps: how much each step counts.
    """

    by_timesteps: ClassVar[bool] = False
    """Whether steps are weighted while it is gathered, so that another weighting has to be gathered anew."""

    def __init__(self, steps: int = 1, timesteps: Timesteps = "uniform") -> None:
        self.steps, self.timesteps = steps, timesteps

    @abstractmethod
    def empty(self, target: Target) -> Tensor:
        """Zeros of the sum's shape, on the layer's device."""

    @abstractmethod
    def bytes_of(self, target: Target) -> int:
        """How much memory the sum of a layer takes."""

    @abstractmethod
    def term(self, target: Target, inputs: Tensor) -> Tensor:
        """What inputs, in the layer's own shape, contribute."""

    @abstractmethod
    def add(self, total: Tensor, term: Tensor, step: int) -> None:
        """Add a contribution of one denoising step, in place."""

    @abstractmethod
    def average(self, total: Tensor, calls: Mapping[int, int]) -> None:
        """Bring a sum over one batch to one call of the layer a denoising step, in place.

        Args:
            total: the sum.
            calls: how often the layer was called, by step.
        """

    @abstractmethod
    def finish(self, total: Tensor, samples: int) -> Tensor:
        """The statistic, float32, from the sum over `samples` prompts: what is stored."""


def statistic_class(name: str) -> type[Statistic]:
    """A statistic by name.

    Raises:
        InputError: for an unknown name.
    """
    found = _by_name()
    if name not in found:
        raise unknown("statistic", name, statistic_names())
    return found[name]


def statistic_names() -> list[str]:
    """Names of all statistics of layer inputs."""
    return sorted(name for name, cls in _by_name().items() if issubclass(cls, InputStatistic))


def _by_name() -> dict[str, type[Statistic]]:
    """All statistics by name; a name of this package means its own class."""
    classes: list[Any] = [cls for cls in descendants(Statistic) if not isabstract(cls)]
    return {cls.name: cls for cls in sorted(classes, key=is_packaged)}


def statistic(name: str, steps: int = 1, timesteps: Timesteps = "uniform") -> InputStatistic:
    """A statistic of layer inputs by name, over so many denoising steps.

    Raises:
        InputError: for an unknown name.
    """
    cls = statistic_class(name)
    if not issubclass(cls, InputStatistic):
        raise unknown("statistic of layer inputs", name, statistic_names())
    return cls(steps, timesteps)
