"""One pipeline in memory that is the dense model and pruned ones in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from torch import Tensor, nn

from sdprune.pipelines import DiffusersFamily
from sdprune.pruning import PruneSpec, targets_of

M = TypeVar("M")


class Weights(Generic[M]):
    """The weights that may be pruned, kept as they were dense, and as the last pruned model had them.

    Args:
        pipeline: that is loaded, dense.
        specs: say by component which layers may be pruned.
        dense: what the dense model is called, among what models are called.
    """

    def __init__(self, pipeline: DiffusersFamily, specs: Mapping[str, PruneSpec], dense: M) -> None:
        self.layers: dict[tuple[str, str], nn.Parameter] = {
            (name, target.name): target.weight
            for name, spec in specs.items()
            for target in targets_of(pipeline.components[name], spec)
        }
        self.dense = self._copied()
        self.pruned: dict[tuple[str, str], Tensor] = {}
        self.unpruned = self.kept = self.active = dense

    def _copied(self) -> dict[tuple[str, str], Tensor]:
        return {key: weight.detach().clone() for key, weight in self.layers.items()}

    def become(self, model: M, prune: Callable[[M], None]) -> None:
        """Give the pipeline the weights of a model.

        Args:
            model: dense or pruned.
            prune: makes the pruned model of the dense one; where it fails, the pipeline is dense.
        """
        if model == self.active:
            return
        self._write(self.pruned if model == self.kept != self.unpruned else self.dense)
        self.active = self.unpruned
        if model not in (self.unpruned, self.kept):
            try:
                prune(model)
            except BaseException:
                self._write(self.dense)
                raise
            self.pruned, self.kept = self._copied(), model
        self.active = model

    def _write(self, weights: Mapping[tuple[str, str], Tensor]) -> None:
        for key, weight in self.layers.items():
            weight.detach().copy_(weights[key])
