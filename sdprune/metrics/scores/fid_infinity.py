"""Frechet distance extrapolated to infinitely many generated images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sdprune.errors import InputError
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.frechet_to import FrechetTo
from sdprune.metrics.rows import Rows, once
from sdprune.metrics.scores.base import FeatureScore


class FrechetDistanceAtInfinity(FeatureScore):
    """FID as it would be of infinitely many generated images; lower is better.

    FID of n images exceeds its limit by roughly c / n. Here it is measured on random subsets of growing size, and a
    straight line in 1 / n is drawn to 0. The real images stay as many as they are. A line fits where even the smallest
    subset has more images than features; with fewer the value is a guess.

    Source: Chong & Forsyth, "Effectively Unbiased FID and Inception Score and where to find them", CVPR 2020, with
    evenly spaced subset sizes from n / 10, or from twice the number of features if that is more (but at most n / 2).

    Args:
        extractor: the network and its protocol.
        name: key of the score in the results.
        subsets: number of subsets, each of another size.
    """

    minimum = 4

    def __init__(self, extractor: FeatureExtractor, name: str = "fid_infinity", subsets: int = 15) -> None:
        super().__init__(extractor, name)
        if subsets < 2:
            raise InputError(f"subsets must be at least 2 for a line, got {subsets}.")
        self.subsets = subsets

    def describe(self) -> dict[str, Any]:
        """Also the number of subsets."""
        return {**super().describe(), "subsets": self.subsets}

    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`{name: value}`. Raises InputError for fewer than four images."""
        return {self.name: self._at_infinity(rows, reference)}

    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`<name>_diff` to the dense model's, on the same subsets. FID's own interval tells what it is worth."""
        difference = self._at_infinity(rows, reference) - self._at_infinity(dense_rows, reference)
        return {f"{self.name}_diff": difference}

    def remarks(self, scores: Mapping[str, float], rows: Rows) -> list[str]:
        """A distance below 0, which no distance can be."""
        if scores[self.name] >= 0:
            return []
        n, d = self.features(rows).shape
        return [
            f"{self.name} is {scores[self.name]:.4f}, and no distance is below 0: the line in 1/n was drawn through "
            f"{n} images with {d} features each, and missed. Read it as 0, or draw more images."
        ]

    @once
    def _at_infinity(self, rows: Rows, reference: Statistics | None) -> float:
        features = self.features(rows)
        n, d = features.shape
        if n < self.minimum:
            raise InputError(f"{self.name} needs at least 4 images for subsets of two sizes, got {n}.")
        first = max(n // 10, min(2 * d, n // 2), 2)
        sizes = np.linspace(first, n, self.subsets).astype(int)
        shuffled = np.random.default_rng(0)
        subsets = [torch.from_numpy(shuffled.permutation(n)[:size]) for size in sizes]
        distances = FrechetTo(self.require(reference), features.device).resampled(features, subsets)
        _, intercept = np.polyfit(1 / sizes, distances.numpy(), 1)
        return float(intercept)
