"""The same sparsity everywhere."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sdprune.pruning.allocation.base import Allocation
from sdprune.pruning.targets import Target


class Uniform(Allocation):
    """Every layer gets the overall sparsity."""

    def sparsities(  # noqa: D102
        self, targets: Sequence[Target], sparsity: float, statistics: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, float]:
        return {target.name: sparsity for target in targets}
