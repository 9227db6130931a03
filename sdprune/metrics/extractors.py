"""Feature extractors for FID: one class a network, light to construct, loaded late."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.metrics.clip import ClipModel
from sdprune.metrics.inference import exact_inference
from sdprune.metrics.preprocess import check_images, clean_resize


class FeatureExtractor(ABC):
    """Maps images to feature vectors; the network and the preprocessing together are a *protocol* with a name.

    A plain object, not an `nn.Module`: as somebody's submodule it would be cast by precision plugins. Constructing
    one reads no weights; `load` or the first use does. To add one: subclass, implement the five abstract members.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Protocol name, stored with statistics; features of different names cannot be compared."""

    @property
    @abstractmethod
    def num_features(self) -> int:
        """Length d of a feature vector."""

    @abstractmethod
    def load(self, device: torch.device | str) -> None:
        """Load the weights, or move what is loaded, to `device`. Raises InputError when they cannot be had."""

    @abstractmethod
    def preprocess(self, images: Tensor) -> Tensor:
        """Network inputs [b, 3, H, W] float32 of uint8 images [b, 3, h, w]; H and W are the same for every h and w."""

    @abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """Features [b, d] float32 of preprocessed pixels [b, 3, H, W]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able facts that the features depend on, for fingerprints; needs no loaded weights."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features [b, d] float32 of uint8 images [b, 3, h, w], on the extractor's device.

        Raises:
            ValueError: anything else than a uint8 batch.
        """
        check_images(images)
        return self.extract(self.preprocess(images))


class ClipImageFeatures(FeatureExtractor):
    """CLIP's image embeddings (the projection's output, not normalised) as FID features.

    Args:
        model: a directory, a hub id, or `miniature` for the evaluator that comes with this package.
        revision: branch, tag or commit of the hub repository; None means `main`.
    """

    def __init__(self, model: str = "openai/clip-vit-base-patch32", revision: str | None = None) -> None:
        self.clip = ClipModel(model, revision)

    @property
    def name(self) -> str:  # noqa: D102
        return f"clip:{self.clip.label}"

    @property
    def num_features(self) -> int:  # noqa: D102
        return self.clip.embedding_size

    def load(self, device: torch.device | str) -> None:  # noqa: D102
        self.clip.load(device)

    def preprocess(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.clip.preprocess(images)

    def extract(self, pixels: Tensor) -> Tensor:  # noqa: D102
        return self.clip.embed_pixels(pixels)

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {"class": "ClipImageFeatures", **self.clip.describe()}


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of the FID of the literature, with clean-fid's resize (protocol `clean`).

    Images are resized by PIL's bicubic rule in float to 299 x 299, not rounded, shifted and scaled by (x - 128) / 128,
    and go through the Inception v3 of torch-fidelity (the converted 2015-12-05 TensorFlow graph) without its own
    resize, as in Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", CVPR 2022.
    Needs `pip install "sdprune[inception]"`; the weights (91 MB) are downloaded once.

    Args:
        weights: a local copy of `weights-inception-2015-12-05-6726825d.pth`; None downloads it.
    """

    num_features = 2048
    name = "inception-2048/clean"

    def __init__(self, weights: str | None = None) -> None:
        if weights is not None and not Path(weights).is_file():
            raise InputError(f"No Inception weights at {weights!r}. Give an existing file, or null to download them.")
        self.weights = weights
        self.device = torch.device("cpu")
        self._network: nn.Module | None = None

    def load(self, device: torch.device | str) -> None:  # noqa: D102
        self.device = torch.device(device)
        if self._network is None:
            self._network = _inception_trunk(self.weights)
        self._network.to(self.device)

    def preprocess(self, images: Tensor) -> Tensor:  # noqa: D102
        return (clean_resize(images.to(self.device)) - 128) / 128

    def extract(self, pixels: Tensor) -> Tensor:  # noqa: D102
        if self._network is None:
            self.load(self.device)
        assert self._network is not None
        with exact_inference(self.device):
            return self._network(pixels.to(self.device)).flatten(1)

    def describe(self) -> dict[str, Any]:  # noqa: D102
        facts: dict[str, Any] = {"class": "InceptionFeatures", "name": self.name, "weights": "2015-12-05-6726825d"}
        if self.weights is not None:
            facts["weights"] = hashlib.sha256(Path(self.weights).read_bytes()).hexdigest()
        return facts


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
