"""Magnitude pruning."""

from collections.abc import Mapping

from torch import Tensor

from sdprune.pruning.criteria.base import Ranking


class Magnitude(Ranking):
    """|W|, in the weight's own dtype (Han et al. 2015, Learning both Weights and Connections)."""

    rowwise = True

    def score(self, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return weight.abs()
