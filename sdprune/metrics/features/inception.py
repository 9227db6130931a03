"""The Inception network of the literature's FID."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.errors import InputError, unknown
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.features.inference import exact_inference
from sdprune.metrics.features.preprocess import PROTOCOLS


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of the FID of the literature: Inception v3 of the 2015-12-05 TensorFlow graph.

    Needs `pip install "sdprune[inception]"`; the weights (91 MB), converted by torch-fidelity, are downloaded once.

    Args:
        protocol: how images come to the network's 299 x 299 pixels; numbers of different protocols cannot be compared.
            `clean`: antialiased bicubic resize, rounded to whole grey levels, both sides alike.
            `pytorch-fid`: that package's: bilinear resize without antialiasing, both sides alike.
            `study`: that of the study's scripts: a generated image is saved as JPEG, then both sides are resized by PIL
            (bicubic) and saved as JPEG.
        weights: a local copy of `weights-inception-2015-12-05-6726825d.pth`; null downloads it.

    Source: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022, for `clean`,
    which there is not rounded; github.com/mseitzer/pytorch-fid.
    """

    num_features = 2048

    def __init__(self, protocol: str = "clean", weights: str | None = None) -> None:
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
        if weights is not None and not Path(weights).is_file():
            raise InputError(f"No Inception weights at {weights!r}. Give an existing file, or null to download them.")
        self.protocol = protocol
        self.weights = weights
        self.device = torch.device("cpu")
        self._network: nn.Module | None = None

    @property
    def name(self) -> str:  # noqa: D102
        return f"inception-2048/{self.protocol}"

    def load(self, device: torch.device | str) -> None:  # noqa: D102
        self.device = torch.device(device)
        if self._network is None:
            self._network = _inception_trunk(self.weights)
        self._network.to(self.device)

    def preprocess(self, images: Tensor, generated: bool = True) -> Tensor:  # noqa: D102
        return PROTOCOLS[self.protocol](images.to(self.device), generated)

    def extract(self, pixels: Tensor) -> Tensor:  # noqa: D102
        if self._network is None:
            self.load(self.device)
        assert self._network is not None
        with exact_inference(self.device):
            return self._network(pixels.to(self.device)).flatten(1)

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {"class": "InceptionFeatures", "name": self.name, "weights": self._weights_hash}

    @cached_property
    def _weights_hash(self) -> str:
        if self.weights is None:
            return "2015-12-05-6726825d"
        return hashlib.sha256(Path(self.weights).read_bytes()).hexdigest()


def _inception_trunk(weights: str | None) -> nn.Module:
    """The network from its first convolution to its pooling, fed floats: its own forward takes uint8 and resizes."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            'InceptionFeatures needs torch-fidelity and torchvision: pip install "sdprune[inception]". Without them '
            "use another extractor, such as ClipImageFeatures."
        ) from error
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"Cannot load the Inception weights ({weights or 'download'}): {reason}") from error
    # The forward pass is its children in order, the classifier `fc` last.
    return nn.Sequential(*list(network.children())[:-1])
