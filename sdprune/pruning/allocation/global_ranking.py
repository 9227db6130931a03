"""Layer sparsities from one ranking of all weights."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

from torch import Tensor

from sdprune.errors import InputError, unknown
from sdprune.pruning.allocation.base import Allocation, Norms, Share
from sdprune.pruning.criteria.base import Ranking
from sdprune.pruning.criteria.magnitude import Magnitude
from sdprune.pruning.criteria.wanda import Wanda
from sdprune.pruning.selection import Layer, count, select
from sdprune.pruning.targets import Target

_RANKINGS: dict[str, type[Ranking]] = {"Magnitude": Magnitude, "Wanda": Wanda}


class GlobalRanking(Allocation):
    """Each layer gets the share of its weights that are among the lowest of the whole component.

    With granularity layer and the same criterion this prunes what granularity component prunes; it serves the criteria
    and granularities that cannot rank a whole component.

    Args:
        by: what ranks: Magnitude or Wanda.
    """

    def __init__(self, by: str = "Magnitude") -> None:
        if by not in _RANKINGS:
            raise unknown("ranking", by, _RANKINGS)
        self.by = by

    @property
    def statistics(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the ranking criterion."""
        return _RANKINGS[self.by].statistics

    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> Mapping[str, Share]:  # noqa: D102
        layers = [Layer(target, [partial(self._scores, target, statistics)]) for target in targets]
        if len({target.weight.dtype for target in targets}) > 1:
            raise InputError("GlobalRanking wants layers of one dtype: load the model in one.")
        total = sum(target.weight.numel() for target in targets)
        masks = select(layers, 0, count(total, sparsity))
        return {
            target.name: Fraction(int(mask.sum()), mask.numel()) for target, mask in zip(targets, masks, strict=True)
        }

    def _scores(self, target: Target, statistics: Norms) -> Tensor:
        ranking = _RANKINGS[self.by]()
        own = {name: target.by_row(statistics[name][target.name]) for name in ranking.statistics}
        return ranking.score(target.matrix, own)
