"""What every allocation is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from sdprune.pruning.targets import Target


class Allocation(ABC):
    """Shares an overall sparsity out among layers.

    A subclass is one file in this folder. It can be made without arguments; its options are keyword arguments of
    `__init__`, kept as attributes of the same names.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics of the layers' inputs that `sparsities` reads."""

    @abstractmethod
    def sparsities(
        self, targets: Sequence[Target], sparsity: float, statistics: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Choose each layer's sparsity.

        Args:
            targets: the layers, dense.
            sparsity: the overall one, in [0, 1].
            statistics: by statistic name, then by layer name: at least those the class names.

        Returns:
            By layer name, each in [0, 1], with the mean weighted by the layers' sizes equal to `sparsity`.
        """
