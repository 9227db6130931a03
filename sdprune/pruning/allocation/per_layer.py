"""Sparsities written out."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Dict, Optional

from sdprune.errors import InputError, as_share
from sdprune.pruning.allocation.base import Allocation, Norms
from sdprune.pruning.targets import Target


class PerLayer(Allocation):
    """Each layer gets what the configuration says of it, the others the overall sparsity, whatever the mean becomes.

    The counts are exact layer by layer; in granularity module_block the layers of a block lose their sum together.

    Args:
        layers: sparsities by shell pattern on layer names; of several that match a layer the first counts.
    """

    explicit = True

    def __init__(self, layers: Optional[Dict[str, float]] = None) -> None:
        self.layers = dict(layers or {})
        for pattern, sparsity in self.layers.items():
            as_share(f"layers[{pattern!r}]", sparsity)

    @property
    def prunes(self) -> bool:  # noqa: D102
        return any(self.layers.values())

    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> dict[str, float]:
        """See Allocation.

        Raises:
            InputError: for a pattern that matches no layer.
        """
        for pattern in self.layers:
            if not any(fnmatchcase(target.name, pattern) for target in targets):
                raise InputError(
                    f"PerLayer: pattern {pattern!r} matches none of the {len(targets)} layers, such as "
                    f"{targets[0].name!r}; use * for any part."
                )
        return {target.name: self._of(target.name, sparsity) for target in targets}

    def _of(self, name: str, default: float) -> float:
        return next((found for pattern, found in self.layers.items() if fnmatchcase(name, pattern)), default)
