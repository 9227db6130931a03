"""What the metrics share that compare features of generated with features of real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.identity import facts_of
from sdprune.metrics.base import PerImageMetric
from sdprune.metrics.extractors import FeatureExtractor
from sdprune.metrics.frechet import Statistics


class FeatureMetric(PerImageMetric):
    """Keeps the features of the images, and a reference of real ones.

    The reference is not part of the gathered states: every process holds the same one and it is counted once.

    Args:
        extractor: the network and its protocol, e.g. `InceptionFeatures` (the literature's) or `ClipImageFeatures`.
        name: key of the score in the results.
    """

    columns = ("features",)
    extractor: FeatureExtractor
    features: list[Tensor]
    reference_features: ClassVar[bool] = True
    """Whether it looks at the real images' features; else at their mean and covariance alone."""

    def __init__(self, extractor: FeatureExtractor, name: str) -> None:
        super().__init__()
        self.extractor = extractor
        self.name = name
        self.reference: Statistics | None = None

    def keys(self) -> dict[str, str]:
        """Named after the extractor, so that a record keeps them once."""
        return {"features": f"{self.extractor.key}.features"}

    def prepare(self, device: torch.device | str) -> None:
        """Load the extractor on `device`."""
        self.to(device)
        self.extractor.load(device)

    def set_reference(self, statistics: Statistics) -> None:
        """Compare with these statistics of real images.

        Raises:
            InputError: made by another extractor, of another length, or without the features that it needs.
        """
        made_by, size = statistics.extractor, len(statistics.mu)
        if made_by is not None and made_by != self.extractor.name:
            raise InputError(f"The reference was made with {made_by!r}, the metric uses {self.extractor.name!r}.")
        if size != self.extractor.num_features:
            raise InputError(
                f"The reference has {size} features, {self.extractor.name!r} has {self.extractor.num_features}."
            )
        if self.reference_features and statistics.features is None:
            raise InputError(
                f"{self.name} needs the features of every real image, and the reference has mu and sigma alone: choose "
                "the reference `drawn` or `split`, or leave the metric out."
            )
        self.reference = statistics
        self._computed = None

    def update(  # noqa: D102
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        positions: Tensor | Sequence[int],
        features: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        self.append(positions, features=self.extractor(images) if features is None else features)

    def describe(self) -> dict[str, Any]:
        """Name and extractor; the reference is a fact of the data."""
        return {"class": type(self).__name__, "name": self.name, "extractor": facts_of(self.extractor)}

    def _reference(self) -> Statistics:
        if self.reference is None:
            raise RuntimeError(f"{self.name} has no reference: call set_reference.")
        return self.reference

    def _real(self) -> Tensor:
        features = self._reference().features
        assert features is not None
        return features.double()

    def _features(self) -> Tensor:
        return self.rows()["features"].double()

    def _feature_pairs(self, dense_rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        own, dense = self._paired(dense_rows)
        return own["features"].double(), dense["features"].double()
