"""What the metrics share that compare features of generated with features of real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.identity import facts_of
from sdprune.metrics.base import PerImageMetric
from sdprune.metrics.extractors import FeatureExtractor
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.frechet_to import FrechetTo

T = TypeVar("T")


class FeatureMetric(PerImageMetric):
    """Keeps the features of the images, and a reference of real ones.

    The reference is not part of the gathered states: every process holds the same one and it is counted once. All
    algebra is done in float64, on the GPU that the metric was prepared on, else on the CPU.

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
        self._made: dict[str, Any] = {}

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
        self._made.clear()

    def update(  # noqa: D102
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        positions: Tensor | Sequence[int],
        features: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        self.append(positions, features=self.extractor(images) if features is None else features)

    def append(self, positions: Tensor | Sequence[int], **columns: Tensor) -> None:
        """Add rows: positions [b] and features [b, d]."""
        super().append(positions, **columns)
        self._made.clear()

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._made.clear()

    def describe(self) -> dict[str, Any]:
        """Name and extractor; the reference is a fact of the data."""
        return {"class": type(self).__name__, "name": self.name, "extractor": facts_of(self.extractor)}

    def _reference(self) -> Statistics:
        if self.reference is None:
            raise RuntimeError(f"{self.name} has no reference: call set_reference.")
        return self.reference

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """What is costly to make, and the same until the rows or the reference change: `compare` finds it made."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _to_reference(self) -> FrechetTo:
        return self._once("distance", lambda: FrechetTo(self._reference(), self._float64_device))

    @property
    def _float64_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def _real(self) -> Tensor:
        features = self._reference().features
        assert features is not None
        return features.to(self._float64_device, torch.float64)

    def _features(self) -> Tensor:
        return self.rows()["features"].to(self._float64_device, torch.float64)

    def _dense_features(self, dense_rows: Mapping[str, Tensor]) -> Tensor:
        """Features of the dense model's images, after a look at whether they pair up with the generated ones."""
        return self._paired(dense_rows)[1]["features"].to(self._float64_device, torch.float64)
