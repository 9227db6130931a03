"""The same sparsity everywhere."""

from collections.abc import Sequence

from sdprune.pruning.allocation.base import Allocation, Norms
from sdprune.pruning.targets import Target


class Uniform(Allocation):
    """Every layer gets the overall sparsity."""

    explicit = True

    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> dict[str, float]:  # noqa: D102
        return {target.name: sparsity for target in targets}

    def original(  # noqa: D102
        self, targets: Sequence[Target], sparsity: float, statistics: Norms, criterion: str
    ) -> dict[str, float]:
        return self.sparsities(targets, sparsity, statistics)
