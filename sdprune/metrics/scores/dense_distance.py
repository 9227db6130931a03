"""How far each image has moved from the dense model's image of the same prompt and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdprune.errors import InputError
from sdprune.identity import facts_of
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.features.inference import exact_inference
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.paired import Interval, mean, normal_interval
from sdprune.metrics.rows import Column, ImageBatch, Rows
from sdprune.metrics.scores.base import Score


class DenseDistance(Score):
    """Distance of each image to the dense model's: PSNR, SSIM, distance of features, and LPIPS on request.

    The dense model itself is at no distance. SSIM is that of Wang et al., 2004, as torchmetrics computes it (Gaussian
    window of 11 pixels, sigma 1.5, borders mirrored). The feature distance is 1 minus the cosine of the two features.

    Args:
        extractor: the network of the feature distance.
        name: put before every score, with an underscore.
        lpips: also LPIPS (Zhang et al., 2018) on AlexNet; needs `pip install "sdprune[lpips]"` and downloads 240 MB.
    """

    extractor: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, name: str = "dense", lpips: bool = False) -> None:
        self.extractor = extractor
        self.name = name
        self.lpips = lpips

    @property
    def columns(self) -> Sequence[Column]:
        """Errors and similarities to the dense image, and the features."""
        columns = [
            self.extractor.features,
            to_dense("mse", squared_error, of_equals=0),
            to_dense("ssim", structural_similarity, of_equals=1),
        ]
        lpips = _Lpips()
        return [*columns, to_dense("lpips", lpips, of_equals=0, prepare=lpips.load)] if self.lpips else columns

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """The titles of the distances, all of which are comparisons."""
        kinds = ["psnr", "ssim", "feature_distance", *(["lpips"] if self.lpips else [])]
        return [], [f"{self.name}_{kind}" for kind in kinds]

    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """Nothing: the distances are comparisons."""
        return {}

    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`<name>_psnr` in dB (of the mean squared error, left out where all images are equal), `<name>_ssim`,
        `<name>_feature_distance` and `<name>_lpips`, with `_low`, `_high` and `_se` of all but the first.
        """
        features, error, ssim, *lpips = self.read(rows)
        dense = self.read(dense_rows)[0]
        distances = {"ssim": ssim, "feature_distance": 1 - F.cosine_similarity(features.double(), dense.double())}
        if lpips:
            distances["lpips"] = lpips[0].double()
        mse = error.mean()
        result = {f"{self.name}_psnr": float(10 * torch.log10(255**2 / mse))} if mse > 0 else {}
        for title, values in distances.items():
            average = mean(values)
            interval = normal_interval(average, values) if len(values) > 1 else Interval(average, average, average, 0.0)
            result |= interval.as_dict(f"{self.name}_{title}")
        return result

    def per_image(self, rows: Rows) -> dict[str, Tensor]:
        """Mean squared error, SSIM and LPIPS of each image, to the dense model's."""
        _, error, ssim, *lpips = self.read(rows)
        values = {f"{self.name}_mse": error, f"{self.name}_ssim": ssim}
        return values | ({f"{self.name}_lpips": lpips[0]} if lpips else {})

    @property
    def paired(self) -> dict[str, bool]:
        """All of `per_image`."""
        kinds = {"mse": False, "ssim": True} | ({"lpips": False} if self.lpips else {})
        return {f"{self.name}_{kind}": higher for kind, higher in kinds.items()}

    def describe(self) -> dict[str, Any]:
        """Extractor, and whether LPIPS is among the distances."""
        facts = {"class": "DenseDistance", "name": self.name, "extractor": facts_of(self.extractor)}
        return facts | ({"lpips": "alex"} if self.lpips else {})


def to_dense(name: str, between: Callable[[Tensor, Tensor], Tensor], of_equals: float, **options: Any) -> Column:
    """A number for each image and the dense model's, both uint8 [b, 3, h, w]; `of_equals` for the dense model's own."""
    return Column(f"dense.{name}", partial(_to_dense, between, of_equals), needs_dense=True, **options)


def _to_dense(between: Callable[[Tensor, Tensor], Tensor], of_equals: float, batch: ImageBatch) -> Tensor:
    if batch.dense is None:
        return torch.full((len(batch.images),), of_equals, dtype=torch.float64)
    return between(batch.images, batch.dense.to(batch.images.device))


def squared_error(images: Tensor, dense: Tensor) -> Tensor:
    """Mean squared error over pixels and colours, in squared grey levels."""
    return (images.double() - dense.double()).square().flatten(1).mean(1)


def structural_similarity(images: Tensor, dense: Tensor) -> Tensor:
    """SSIM."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    with exact_inference(images.device):
        value = structural_similarity_index_measure(images.float(), dense.float(), data_range=255.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)


class _Lpips:
    """LPIPS on AlexNet."""

    network: Any = None

    def load(self, device: torch.device | str) -> None:
        self.network = _load_lpips(device)

    def __call__(self, images: Tensor, dense: Tensor) -> Tensor:
        with exact_inference(images.device):
            return self.network(images.float() / 127.5 - 1, dense.float() / 127.5 - 1).flatten()


def _load_lpips(device: torch.device | str) -> Any:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.requires_grad_(False).to(device)
    except (ImportError, OSError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f'LPIPS cannot be loaded ({reason}): pip install "sdprune[lpips]" and let it download AlexNet once, or '
            "leave lpips at false; the feature distance is there without it."
        ) from error
