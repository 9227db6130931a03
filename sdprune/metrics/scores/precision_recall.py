"""Which generated images look real, and which real ones are within reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.paired import mean, paired_bootstrap
from sdprune.metrics.rows import Rows, once
from sdprune.metrics.scores.base import FeatureScore

_CHUNK = 1024  # rows of a distance matrix at a time
_ROUNDING = 1e-12  # squared distances by matrix products are off by less than this share of the squared lengths
_TIES = 8  # neighbours beyond the k-th whose distances are computed exactly too


class PrecisionRecall(FeatureScore):
    """Precision: the share of generated images near a real one; recall: the share of real ones near a generated one.

    Near means no farther than that image is from its k-th nearest neighbour among its own kind. Both
    depend on how many images are looked at (few of them in many dimensions let both rise towards 1), so compare only
    runs of the same n.

    Distances come from matrix products in float64. Where that could decide otherwise than the distance itself, at a
    near tie, the difference of the two rows is taken: decisions are those of exact distances, and a tie counts as near.

    Args:
        extractor: the network and its protocol.
        name: put before `precision` and `recall`, with an underscore, where it is not empty.
        neighbours: k.
        resamples: bootstrap resamples of `compare`.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019.
    """

    higher_is_better = True
    reference_features = True

    def __init__(self, extractor: FeatureExtractor, name: str = "", neighbours: int = 3, resamples: int = 1000) -> None:
        super().__init__(extractor, name)
        if neighbours < 1:
            raise InputError(f"neighbours must be at least 1, got {neighbours}.")
        if resamples < 2:
            raise InputError(f"resamples must be at least 2, got {resamples}.")
        self.neighbours, self.resamples = neighbours, resamples
        self.minimum = neighbours + 1

    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`precision` and `recall`. Raises InputError for not more images than neighbours."""
        realistic, reached = self._memberships(rows, reference)
        return {self._titled("precision"): mean(realistic), self._titled("recall"): mean(reached)}

    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`precision_diff` with its interval over prompts, and `recall_diff` without one.

        Recall belongs to the set of generated images as a whole: resampling prompts would shrink the set.
        """
        pruned, dense = self._memberships(rows, reference), self._memberships(dense_rows, reference)
        interval = paired_bootstrap(pruned[0], dense[0], mean, self.resamples)
        difference = mean(pruned[1]) - mean(dense[1])
        return interval.as_dict(f"{self._titled('precision')}_diff") | {f"{self._titled('recall')}_diff": difference}

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """Of both."""
        names = [self._titled("precision"), self._titled("recall")]
        return names, [f"{name}_diff" for name in names]

    def describe(self) -> dict[str, Any]:
        """Also the number of neighbours."""
        return {**super().describe(), "neighbours": self.neighbours}

    def _titled(self, score: str) -> str:
        return f"{self.name}_{score}" if self.name else score

    @once
    def _memberships(self, rows: Rows, reference: Statistics | None) -> tuple[Tensor, Tensor]:
        """Of each generated image whether it is near a real one [n], of each real one the reverse [m]; 0 or 1."""
        own, reference = self.features(rows), self.require(reference)
        real, real_reach = self.real_features(reference, like=own), self._real_reach(reference, own.device)
        reach, realistic, reached = self._squared_reach(own), [], torch.zeros_like(real_reach, dtype=torch.bool)
        for chunk, its_reach in zip(own.split(_CHUNK), reach.split(_CHUNK), strict=True):
            distances = _Distances(chunk, real)
            realistic.append(distances.within(real_reach).any(1))
            reached |= distances.within(its_reach[:, None]).any(0)
        return torch.cat(realistic).double().cpu(), reached.double().cpu()

    @once
    def _real_reach(self, reference: Statistics, device: torch.device) -> Tensor:
        return self._squared_reach(self.real_features(reference, torch.empty(0, dtype=torch.float64, device=device)))

    def _squared_reach(self, rows: Tensor) -> Tensor:
        """Squared distance of each row to its k-th nearest other row, [n]."""
        if len(rows) <= self.neighbours:
            raise InputError(
                f"Precision and recall with {self.neighbours} neighbours need more images than that, got {len(rows)}."
            )
        parts = []
        for start in range(0, len(rows), _CHUNK):
            chunk = _Distances(rows[start : start + _CHUNK], rows)
            chunk.squared.diagonal(start).fill_(torch.inf)
            parts.append(chunk.smallest(self.neighbours))
        return torch.cat(parts)


class _Distances:
    """Squared distances [n, m] of rows `a` [n, d] to rows `b` [m, d], exact where a decision hangs on it."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        lengths = a.square().sum(1)[:, None] + b.square().sum(1)
        self.squared = torch.addmm(lengths, a, b.T, alpha=-2)
        self.rounding = lengths.mul_(_ROUNDING)

    def within(self, squared: Tensor) -> Tensor:
        """Which are at most `squared`, which is broadcast."""
        beyond = self.squared - squared
        near = beyond <= 0
        for places in (beyond.abs_() <= self.rounding).nonzero().split(_CHUNK):
            i, j = places.T
            near[i, j] = self._exact(i, j) <= squared.expand_as(near)[i, j]
        return near

    def smallest(self, k: int) -> Tensor:
        """The k-th smallest of each row, [n]; what is infinite is left out."""
        nearest = self.squared.topk(min(k + _TIES, len(self.b) - 1), largest=False)
        rows = torch.arange(len(self.a), device=self.a.device)
        exact = torch.stack([self._exact(rows, column) for column in nearest.indices.T], 1)
        found = exact.kthvalue(k, dim=1).values
        if exact.shape[1] < len(self.b) - 1:
            others = nearest.values[:, -1] - self.rounding.amax(1)  # are at least as far
            for row in ((others <= found) & (found > 0)).nonzero().flatten():
                distances = (self.a[row] - self.b).square().sum(1)
                found[row] = distances[self.squared[row].isfinite()].kthvalue(k).values
        return found

    def _exact(self, i: Tensor, j: Tensor) -> Tensor:
        return (self.a[i] - self.b[j]).square().sum(1)
