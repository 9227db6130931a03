"""Pruning by weights and activations."""

from collections.abc import Mapping

from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.criteria.base import Ranking


class Wanda(Ranking):
    """|W_ij| * sqrt(s_j) in fp32, s_j the mean squared norm of input j (Sun et al. 2024, eq. 1).

    Inputs that are always 0 score 0 and are pruned first.
    """

    statistics = frozenset({"input_norm"})
    granularities = ("row", "any")
    rowwise = True

    def score(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        squared = statistics["input_norm"]
        if squared.shape not in (weight.shape[1:], weight.shape):
            raise InputError(
                f"Statistic input_norm has shape {list(squared.shape)} for a weight of shape {list(weight.shape)}: "
                "it belongs to another model; gather it again."
            )
        norms = squared.to(weight.device).float().sqrt()
        return weight.float().mul(norms).abs_()
