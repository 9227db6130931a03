"""How far each image has moved from the dense model's image of the same prompt and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdprune.errors import InputError
from sdprune.identity import facts_of
from sdprune.metrics.base import PerImageMetric
from sdprune.metrics.extractors import FeatureExtractor
from sdprune.metrics.inference import exact_inference
from sdprune.metrics.paired import Interval, mean, normal_interval


class DenseDistance(PerImageMetric):
    """Distance of each image to the dense model's: PSNR, SSIM, distance of features, and LPIPS if asked for.

    The dense model itself is at no distance. SSIM is that of Wang et al., 2004, as torchmetrics computes it (Gaussian
    window of 11 pixels, sigma 1.5, borders mirrored). The feature distance is 1 minus the cosine of the two features.

    Args:
        extractor: the network of the feature distance.
        name: put before every score, with an underscore.
        lpips: also LPIPS (Zhang et al., 2018) on AlexNet; needs `pip install "sdprune[lpips]"` and downloads 240 MB.
    """

    needs_dense = True
    extractor: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, name: str = "dense", lpips: bool = False) -> None:
        self.columns = ("mse", "ssim", "features", *(("lpips",) if lpips else ()))  # type: ignore[misc]
        super().__init__()
        self.extractor = extractor
        self.name = name
        self.with_lpips = lpips
        self._lpips: list[Any] = []  # in a list, so that it is no submodule

    def keys(self) -> dict[str, str]:
        """The features are named after the extractor, so that a record keeps them once."""
        return super().keys() | {"features": f"{self.extractor.key}.features"}

    def prepare(self, device: torch.device | str) -> None:
        """Load the networks on `device`.

        Raises:
            InputError: LPIPS without its extra.
        """
        self.to(device)
        self.extractor.load(device)
        if self.with_lpips:
            self._lpips = [_load_lpips(device)]

    def update(  # noqa: D102
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        positions: Tensor | Sequence[int],
        features: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        features = self.extractor(images) if features is None else features
        zero = torch.zeros(len(images), dtype=torch.float64)
        columns = {"mse": zero, "ssim": zero + 1, "features": features, **({"lpips": zero} if self.with_lpips else {})}
        if dense is not None:
            own, other = images.double(), dense.to(images.device).double()
            columns["mse"] = (own - other).square().flatten(1).mean(1)
            columns["ssim"] = _ssim(own.float(), other.float())
            if self.with_lpips:
                with exact_inference(images.device):
                    columns["lpips"] = self._lpips[0](own.float() / 127.5 - 1, other.float() / 127.5 - 1).flatten()
        self.append(positions, **columns)

    def compute(self) -> dict[str, float]:
        """Nothing: the distances are comparisons. Gathers, so that `compare` is local."""
        self.rows()
        return {}

    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """`<name>_psnr` in dB (of the mean squared error, left out where all images are equal), `<name>_ssim`,
        `<name>_feature_distance` and `<name>_lpips`, with `_low`, `_high` and `_se` of all but the first.
        """
        own, dense = self._paired(dense_rows)
        distances = {
            "ssim": own["ssim"],
            "feature_distance": 1 - F.cosine_similarity(own["features"].double(), dense["features"].double()),
        }
        if self.with_lpips:
            distances["lpips"] = own["lpips"].double()
        error = own["mse"].mean()
        result = {f"{self.name}_psnr": float(10 * torch.log10(255**2 / error))} if error > 0 else {}
        for title, values in distances.items():
            average = mean(values)
            interval = normal_interval(average, values) if len(values) > 1 else Interval(average, average, average, 0.0)
            result |= interval.as_dict(f"{self.name}_{title}")
        return result

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """Of the distances, all of which are comparisons."""
        kinds = ["psnr", "ssim", "feature_distance", *(["lpips"] if self.with_lpips else [])]
        return [], [f"{self.name}_{kind}" for kind in kinds]

    def describe(self) -> dict[str, Any]:
        """Extractor, and whether LPIPS is among the distances."""
        facts = {"class": "DenseDistance", "name": self.name, "extractor": facts_of(self.extractor)}
        return facts | ({"lpips": "alex"} if self.with_lpips else {})


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)


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
