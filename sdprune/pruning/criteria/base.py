"""What every criterion is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

Pick = Callable[[Tensor, int, int], Tensor]
"""(scores [rows, stop - start], start, stop) -> which of the columns start to stop - 1 are pruned, bool, same shape."""


class Criterion(ABC):
    """Decides which weights matter. A subclass is one file in this folder, and either a Ranking or a Reconstruction.

    It can be made without arguments; its options are keyword arguments of `__init__`, kept as attributes of the same
    names.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics of the layer's inputs that it reads."""

    granularities: ClassVar[tuple[str, ...]]
    """Names of the granularities that it is defined for, its own first; `any` stands for all there are."""


class Ranking(Criterion):
    """Scores weights: the lowest are pruned first, all others keep their bits."""

    granularities: ClassVar[tuple[str, ...]] = ("layer", "any")

    rowwise: ClassVar[bool] = False
    """Whether a row's scores depend on that row alone. A large layer is then scored some rows at a time."""

    @abstractmethod
    def score(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """Score one layer, or some rows of it.

        Args:
            weight: [rows = outputs, columns = inputs], not to be changed.
            statistics: this layer's, by name: at least those the class names. `input_norm` is [columns], or of a
                grouped convolution [rows, columns].

        Returns:
            [rows, columns], floats of 0 and up, the same on every call.
        """


class Reconstruction(Criterion):
    """Prunes column after column and changes the weights that are left, so that outputs stay close."""

    @abstractmethod
    def reconstruct(
        self, weight: Tensor, statistics: Mapping[str, Tensor], pick: Pick, widths: list[int], original: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Prune one layer.

        Args:
            weight: [rows, columns], not to be changed.
            statistics: this layer's, by name: at least those the class names. `hessian` is [columns, columns].
            pick: chooses among scores; it is called once for every column, in order.
            widths: of the stretches of columns that `pick` wants to see at a time.
            original: do as the published code does, also where that prunes more than was picked.

        Returns:
            The mask, True = pruned; the new weight, 0 where pruned; notes for the report, numbers.
        """
