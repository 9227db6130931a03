"""Frechet distance between the features of generated and of real images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.base import PerImageMetric
from sdprune.metrics.extractors import FeatureExtractor
from sdprune.metrics.frechet import Statistics, feature_statistics, frechet_distance
from sdprune.metrics.paired import FrechetTo, paired_bootstrap


class FrechetInceptionDistance(PerImageMetric):
    """FID of generated images against statistics of real ones; lower is better.

    A finite sample makes FID too large, roughly by a constant over n, so compare only runs of the same n. With
    fewer images than features (n < d) the covariance is singular: the number is still defined and paired differences
    still mean something, but it is far from the value of many images. The reference is not part of the gathered
    states: every process holds the same one and it is counted once.

    Args:
        extractor: the network and preprocessing, e.g. `InceptionFeatures` (the literature's) or `ClipImageFeatures`.
        name: key of the score in the results.
        resamples: bootstrap resamples of `compare`; None means 1,000 up to 512 features and 50 above, where one
            resample of 10,000 images with 2,048 features takes several seconds; 0 gives the difference alone.
    """

    columns = ("features",)
    higher_is_better = False
    features: list[Tensor]

    def __init__(
        self,
        extractor: FeatureExtractor,
        name: str = "fid",
        resamples: int | None = None,
    ) -> None:
        super().__init__()
        if resamples is not None and (resamples < 0 or resamples == 1):
            raise InputError(f"resamples must be 0 or at least 2, got {resamples}.")
        self.extractor = extractor
        self.name = name
        self.resamples = resamples
        self.reference: Statistics | None = None

    @property
    def needs_reference(self) -> bool:
        """True until `set_reference`."""
        return self.reference is None

    def prepare(self, device: torch.device | str) -> None:
        """Load the extractor on `device`."""
        self.to(device)
        self.extractor.load(device)

    def set_reference(self, statistics: Statistics) -> None:
        """Compare with these statistics of real images.

        Raises:
            InputError: made by another extractor, or of another length.
        """
        made_by, size = statistics.extractor, len(statistics.mu)
        if made_by is not None and made_by != self.extractor.name:
            raise InputError(f"The reference was made with {made_by!r}, the metric uses {self.extractor.name!r}.")
        if size != self.extractor.num_features:
            raise InputError(
                f"The reference has {size} features, {self.extractor.name!r} has {self.extractor.num_features}."
            )
        self.reference = statistics
        self._computed = None

    def update(self, images: Tensor, prompts: Sequence[str] | None, positions: Tensor | Sequence[int]) -> None:
        """Add uint8 images [b, 3, h, w] at their positions [b] in the draw; prompts are not looked at."""
        self.append(positions, features=self.extractor(images))

    def compute(self) -> dict[str, float]:
        """`{name: FID}` over all processes.

        Raises:
            InputError: fewer than two images.
            RuntimeError: no reference was given.
        """
        generated, reference = feature_statistics(self.rows()["features"]), self._reference()
        return {self.name: frechet_distance(reference.mu, reference.sigma, generated.mu, generated.sigma)}

    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """FID minus the dense model's FID: `<name>_diff`, and `_low`, `_high` and `_se` by a paired bootstrap.

        Both models are resampled with the same images against the fixed reference, and the interval is centered on
        the difference (see `paired_bootstrap`). It speaks of the difference at this number of images, with the
        finite-sample excess that both FIDs have, and is rather wide than narrow when n is below d.
        """
        own, dense = self._paired(dense_rows)
        resamples = self.resamples if self.resamples is not None else (1000 if own["features"].shape[1] <= 512 else 50)
        statistic = FrechetTo(self._reference())
        if resamples == 0:
            return {f"{self.name}_diff": statistic(own["features"]) - statistic(dense["features"])}
        interval = paired_bootstrap(own["features"], dense["features"], statistic, resamples, centered=True)
        return interval.as_dict(f"{self.name}_diff") | {f"{self.name}_diff_resamples": float(resamples)}

    def describe(self) -> dict[str, Any]:
        """Name and extractor; the reference is a fact of the data."""
        return {"class": "FrechetInceptionDistance", "name": self.name, "extractor": self.extractor.describe()}

    def _reference(self) -> Statistics:
        if self.reference is None:
            raise RuntimeError(f"{self.name} has no reference: call set_reference.")
        return self.reference
