"""Which generated images look real, and which real ones are within reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.extractors import FeatureExtractor
from sdprune.metrics.feature_metric import FeatureMetric
from sdprune.metrics.paired import mean, paired_bootstrap

_CHUNK = 1024  # rows of a distance matrix at a time


class PrecisionRecall(FeatureMetric):
    """Precision: the share of generated images near a real one; recall: the share of real ones near a generated one.

    Near means no farther than that image is from its k-th nearest neighbour among its own kind. Both
    depend on how many images are looked at (few of them in many dimensions let both rise towards 1), so compare only
    runs of the same n.

    Args:
        extractor: the network and its protocol.
        name: put before `precision` and `recall`, with an underscore, where it is not empty.
        neighbours: k.
        resamples: bootstrap resamples of `compare`.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019.
    """

    higher_is_better = True

    def __init__(self, extractor: FeatureExtractor, name: str = "", neighbours: int = 3, resamples: int = 1000) -> None:
        super().__init__(extractor, name)
        if neighbours < 1:
            raise InputError(f"neighbours must be at least 1, got {neighbours}.")
        if resamples < 2:
            raise InputError(f"resamples must be at least 2, got {resamples}.")
        self.neighbours, self.resamples = neighbours, resamples
        self.minimum = neighbours + 1

    def compute(self) -> dict[str, float]:
        """`precision` and `recall` over all processes.

        Raises:
            InputError: not more images than neighbours.
        """
        realistic, reached = self._memberships(self._features())
        return {self._titled("precision"): mean(realistic), self._titled("recall"): mean(reached)}

    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """`precision_diff` with its interval over prompts, and `recall_diff` without one.

        Recall belongs to the set of generated images as a whole: resampling prompts would shrink the set.
        """
        own, dense = self._feature_pairs(dense_rows)
        pruned, unpruned = self._memberships(own), self._memberships(dense)
        interval = paired_bootstrap(pruned[0], unpruned[0], mean, self.resamples)
        difference = mean(pruned[1]) - mean(unpruned[1])
        return interval.as_dict(f"{self._titled('precision')}_diff") | {f"{self._titled('recall')}_diff": difference}

    def describe(self) -> dict[str, Any]:
        """Also the number of neighbours."""
        return {**super().describe(), "neighbours": self.neighbours}

    def _titled(self, score: str) -> str:
        return f"{self.name}_{score}" if self.name else score

    def _memberships(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Of each generated image whether it is near a real one [n], of each real one the reverse [m]; 0 or 1."""
        real = self._real()
        reach = {"real": self._radii(real), "own": self._radii(own)}
        realistic, reached = [], torch.zeros(len(real), dtype=torch.bool)
        for start in range(0, len(own), _CHUNK):
            distances = _distances(own[start : start + _CHUNK], real)
            realistic.append((distances <= reach["real"]).any(1))
            reached |= (distances <= reach["own"][start : start + _CHUNK, None]).any(0)
        return torch.cat(realistic).double(), reached.double()

    def _radii(self, rows: Tensor) -> Tensor:
        """Distance of each row to its k-th nearest other row, [n]."""
        if len(rows) <= self.neighbours:
            raise InputError(
                f"Precision and recall with {self.neighbours} neighbours need more images than that, got {len(rows)}."
            )
        parts = []
        for start in range(0, len(rows), _CHUNK):
            distances = _distances(rows[start : start + _CHUNK], rows)
            distances.diagonal(start).fill_(torch.inf)
            parts.append(distances.kthvalue(self.neighbours, dim=1).values)
        return torch.cat(parts)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
