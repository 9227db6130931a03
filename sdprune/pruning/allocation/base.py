"""What every allocation is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import ClassVar, Optional, Union

from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.statistics.pruned_error import Probe
from sdprune.pruning.targets import Target

Norms = Mapping[str, Mapping[str, Tensor]]
Share = Union[float, Fraction]


class Allocation(ABC):
    """Shares an overall sparsity out among layers.

    A subclass is one file in this folder. It can be made without arguments; its options are keyword arguments of
    `__init__`, kept as attributes of the same names.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics of the dense model that `sparsities` reads."""

    explicit: ClassVar[bool] = False
    """Whether every layer loses just what `sparsities` says of it, rounded by itself. Otherwise the component loses the
    overall sparsity, and that count is shared out among the layers, so that rounding does not add up."""

    probe: Optional[Probe] = None
    """How the statistic `pruned_error` is measured, where `sparsities` reads it."""

    @property
    def prunes(self) -> bool:
        """Whether layers can lose weights although the overall sparsity is 0."""
        return False

    @abstractmethod
    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> Mapping[str, Share]:
        """Choose each layer's sparsity.

        Args:
            targets: the layers, dense.
            sparsity: the overall one, in [0, 1].
            statistics: by statistic name, then by layer name: at least those the class names. `input_norm` is
                [groups, columns].

        Returns:
            By layer name, each in [0, 1]; unless they are explicit, their mean weighted by the layers' sizes is
            `sparsity`. Fractions where ties matter: a float stands for the decimal number that it is written as.
        """

    def original(
        self, targets: Sequence[Target], sparsity: float, statistics: Norms, criterion: str
    ) -> dict[str, float]:
        """The same as the published code chooses them, for a criterion of that class name.

        Raises:
            InputError: none was published.
        """
        raise InputError(f"mode original: allocation {type(self).__name__} was not published. Use mode exact.")
