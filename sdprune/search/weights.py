"""One pipeline in memory that is the dense model and pruned ones in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from sdprune.search.search import DENSE, Model

Key = tuple[str, str]
"""Component and layer."""


class Weights:
    """The weights that may be pruned, kept as they were dense, and as the last pruned model had them.

    Args:
        layers: of the dense pipeline.
    """

    def __init__(self, layers: Mapping[Key, nn.Parameter]) -> None:
        self.layers = layers
        self.dense = self._copied()
        self.pruned: dict[Key, Tensor] = {}
        self.kept = self.active = DENSE

    def _copied(self) -> dict[Key, Tensor]:
        return {key: weight.detach().clone() for key, weight in self.layers.items()}

    def become(self, model: Model, prune: Callable[[Model], None]) -> None:
        """Give the pipeline the weights of a model.

        Args:
            model: dense or pruned.
            prune: makes the pruned model of the dense one.
        """
        if model == self.active:
            return
        for key, weight in self.layers.items():
            weight.detach().copy_((self.pruned if model == self.kept != DENSE else self.dense)[key])
        if model not in (DENSE, self.kept):
            prune(model)
            self.pruned, self.kept = self._copied(), model
        self.active = model
