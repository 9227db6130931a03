"""Maximum mean discrepancies: distances of two sets of features, unbiased however few images there are."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.features.clip import ClipImageFeatures
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.paired import normal_interval
from sdprune.metrics.rows import Rows, once
from sdprune.metrics.scores.base import FeatureScore

CMMD_MODEL = "openai/clip-vit-large-patch14-336"
_CHUNK = 1024  # rows of a kernel matrix at a time


class KernelScore(FeatureScore):
    """Squared maximum mean discrepancy with a kernel k, as a U-statistic: negative values are noise around 0.

    With generated features x_i and real ones y_j it is the mean of k(x_i, x_j) over i != j, plus that of k(y_i, y_j)
    over i != j, minus twice the mean of k(x_i, y_j) over all i and j.

    Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, eq. 3.
    """

    minimum = 2
    reference_features = True
    scale: ClassVar[float] = 1.0

    @abstractmethod
    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Kernel values [n, m] of rows [n, d] and [m, d], float64."""

    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`{name: value}`."""
        within, between = self._similarities(rows, reference)
        real = self.real_features(reference, like=within)
        return {self.name: self._value(within, between) + self.scale * float(self._within(real).mean())}

    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`<name>_diff` to the dense model's, with `_low`, `_high` and `_se` over images, the real ones fixed.

        By each image's share in the U-statistic (its first-order projection), in pairs; see `normal_interval`.
        """
        own, dense = self._similarities(rows, reference), self._similarities(dense_rows, reference)
        shares = 2 * self.scale * ((own[0] - own[1]) - (dense[0] - dense[1]))
        return normal_interval(self._value(*own) - self._value(*dense), shares).as_dict(f"{self.name}_diff")

    def _value(self, within: Tensor, between: Tensor) -> float:
        """The statistic but for what the real images are among themselves."""
        return self.scale * float(within.mean() - 2 * between.mean())

    @once
    def _similarities(self, rows: Rows, reference: Statistics | None) -> tuple[Tensor, Tensor]:
        """Mean kernel value of each image with the other images, and with the real ones, [n] each."""
        own = self.features(rows)
        real = self.real_features(reference, like=own)
        if len(own) < 2 or len(real) < 2:
            raise InputError(
                f"{self.name} needs at least 2 generated and 2 real images, got {len(own)} and {len(real)}."
            )
        return self._within(own), torch.cat([self.kernel(chunk, real).mean(1) for chunk in own.split(_CHUNK)])

    def _within(self, rows: Tensor) -> Tensor:
        """Mean kernel value of each row with the others, [n]. Each pair of rows is looked at once."""
        sums = torch.zeros_like(rows[:, 0])
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            values = self.kernel(chunk, rows[start:])
            values.diagonal().zero_()
            sums[start : start + _CHUNK] += values.sum(1)
            sums[start + _CHUNK :] += values[:, len(chunk) :].sum(0)
        return sums / (len(rows) - 1)


class KernelInceptionDistance(KernelScore):
    """KID: the discrepancy with the kernel (x.y / d + 1)^3; lower is better.

    Over all images at once, where others average subsets of 1,000: the same expectation with less noise.

    Args:
        extractor: the network and its protocol, `InceptionFeatures` in the literature.
        name: key of the score in the results.

    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """

    def __init__(self, extractor: FeatureExtractor, name: str = "kid") -> None:
        super().__init__(extractor, name)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


class MaximumMeanDiscrepancy(KernelScore):
    """The discrepancy with CMMD's kernel exp(-|x - y|^2 / (2 sigma^2)) on features of length 1, times 1,000.

    It is CMMD, and called so, only with CMMD's own network, CLIP ViT-L/14 at 336 pixels, and its sigma. The authors'
    code counts each image with itself too, which is biased at small n; this one does not.

    Args:
        extractor: the network, e.g. ClipImageFeatures of openai/clip-vit-large-patch14-336.
        name: key of the score in the results; null means `cmmd` where it is that, else `mmd`.
        sigma: width of the kernel.

    Source: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", CVPR 2024.
    """

    scale = 1000.0

    def __init__(self, extractor: FeatureExtractor, name: str | None = None, sigma: float = 10.0) -> None:
        genuine = isinstance(extractor, ClipImageFeatures) and extractor.model == CMMD_MODEL and sigma == 10
        super().__init__(extractor, name or ("cmmd" if genuine else "mmd"))
        if "cmmd" in self.name.lower() and not genuine:
            raise InputError(
                f"Only ClipImageFeatures of {CMMD_MODEL} with sigma 10 make a CMMD, this is {extractor.name!r} with "
                f"sigma {sigma:g}: give another name than {self.name!r}."
            )
        if sigma <= 0:
            raise InputError(f"sigma must be above 0, got {sigma}.")
        self.sigma = sigma

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        return (a @ b.T).sub_(1).div_(self.sigma**2).exp_()

    def describe(self) -> dict[str, Any]:
        """Also the kernel's width."""
        return {**super().describe(), "sigma": self.sigma}
