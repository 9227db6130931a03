"""What every criterion is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor


class Criterion(ABC):
    """Scores weights: the lowest are pruned first.

    A subclass is one file in this folder. It can be made without arguments; its options are keyword arguments of
    `__init__`, kept as attributes of the same names.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics of the layer's inputs that `score` reads."""

    rowwise: ClassVar[bool] = False
    """Whether a row's scores depend on that row alone. A large layer is then scored some rows at a time."""

    @abstractmethod
    def score(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Score one layer.

        Args:
            weight: [rows = outputs, columns = inputs], not to be changed.
            statistics: this layer's, by name: at least those the class names.

        Returns:
            [rows, columns], floats of 0 and up, the same on every call.
        """
