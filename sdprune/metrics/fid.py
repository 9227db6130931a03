"""Frechet distance between the features of generated and of real images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.extractors import FeatureExtractor
from sdprune.metrics.feature_metric import FeatureMetric
from sdprune.metrics.paired import jackknife_interval, paired_bootstrap, require_tolerance


class FrechetInceptionDistance(FeatureMetric):
    """FID of generated images against statistics of real ones; lower is better.

    A finite sample makes FID too large, roughly by a constant over n, so compare only runs of the same n. With
    fewer images than features (n < d) the covariance is singular: the number is still defined and paired differences
    still mean something, but it is far from the value of many images.

    Args:
        extractor: the network and its protocol, e.g. `InceptionFeatures` (the literature's) or `ClipImageFeatures`.
        name: key of the score in the results.
        resamples: how `compare` finds its interval. None: by the jackknife, at any number of images and features in
            seconds. 2 or more: by a bootstrap of so many resamples, which at 10,000 images with 2,048 features take
            4 s each. 0 gives the difference alone.
        tolerance: a pruned model may be worse by this share of the dense model's score (2 % is MLPerf's); null gives
            no verdict.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule ...", NeurIPS 2017.
    """

    higher_is_better = False
    minimum = 2
    reference_features = False

    def __init__(
        self,
        extractor: FeatureExtractor,
        name: str = "fid",
        resamples: int | None = None,
        tolerance: float | None = 0.02,
    ) -> None:
        super().__init__(extractor, name)
        if resamples is not None and (resamples < 0 or resamples == 1):
            raise InputError(f"resamples must be 0 or at least 2, got {resamples}.")
        self.resamples = resamples
        self.tolerance = require_tolerance(tolerance)

    def compute(self) -> dict[str, float]:
        """`{name: FID}` over all processes.

        Raises:
            InputError: fewer than two images.
            RuntimeError: no reference was given.
        """
        return {self.name: self._value()}

    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """FID minus the dense model's FID: `<name>_diff`, and `_low`, `_high` and `_se` over pairs of images.

        The interval speaks of the difference at this number of images, with the finite-sample excess that both FIDs
        have, against these real images: it is about other prompts and noise, not about other real images. In
        simulations with half to four times as many images as features it held the expected difference in 96 to 97 % of
        the cases, where the real images changed with the prompts in 92 to 94 % (64 features,
        tests/benchmarks/test_fid_interval.py). Fewer than three images have no interval.
        """
        own, dense, distance = self._features(), self._dense_features(dense_rows), self._to_reference()
        title = f"{self.name}_diff"
        if self.resamples:
            interval = paired_bootstrap(own, dense, distance, self.resamples, centered=True)
            return interval.as_dict(title) | {f"{title}_resamples": float(self.resamples)}
        difference = self._value() - distance(dense)
        if self.resamples == 0 or len(own) < 3:
            return {title: difference}
        without = self._once("without", lambda: distance.without_each(own)) - distance.without_each(dense)
        return jackknife_interval(difference, without).as_dict(title)

    def _value(self) -> float:
        return self._once("value", lambda: self._to_reference()(self._features()))


class FrechetDistanceAtInfinity(FeatureMetric):
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

    higher_is_better = False
    minimum = 4
    reference_features = False

    def __init__(self, extractor: FeatureExtractor, name: str = "fid_infinity", subsets: int = 15) -> None:
        super().__init__(extractor, name)
        if subsets < 2:
            raise InputError(f"subsets must be at least 2 for a line, got {subsets}.")
        self.subsets = subsets

    def describe(self) -> dict[str, Any]:
        """Also the number of subsets."""
        return {**super().describe(), "subsets": self.subsets}

    def compute(self) -> dict[str, float]:
        """`{name: value}` over all processes.

        Raises:
            InputError: fewer than four images.
        """
        return {self.name: self._value()}

    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """`<name>_diff` to the dense model's, on the same subsets. FID's own interval tells what it is worth."""
        dense = self._dense_features(dense_rows)
        return {f"{self.name}_diff": self._value() - self._at_infinity(dense)}

    def remarks(self, scores: Mapping[str, float]) -> list[str]:
        """A distance below 0, which no distance can be."""
        if scores[self.name] >= 0:
            return []
        n, d = self._features().shape
        return [
            f"{self.name} is {scores[self.name]:.4f}, and no distance is below 0: the line in 1/n was drawn through "
            f"{n} images with {d} features each, and missed. Read it as 0, or draw more images."
        ]

    def _value(self) -> float:
        return self._once("value", lambda: self._at_infinity(self._features()))

    def _at_infinity(self, rows: Tensor) -> float:
        n = len(rows)
        if n < 4:
            raise InputError(f"{self.name} needs at least 4 images for subsets of two sizes, got {n}.")
        first = max(n // 10, min(2 * rows.shape[1], n // 2), 2)
        sizes = np.linspace(first, n, self.subsets).astype(int)
        shuffled = np.random.default_rng(0)
        indices = [torch.from_numpy(shuffled.permutation(n)[:size]) for size in sizes]
        values = self._to_reference().resampled(rows, indices)
        _, intercept = np.polyfit(1 / sizes, values.numpy(), 1)
        return float(intercept)
