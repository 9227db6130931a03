"""What every feature extractor is."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sdprune.identity import facts_of
from sdprune.metrics.features.preprocess import check_images
from sdprune.metrics.rows import Column, ImageBatch


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
    def preprocess(self, images: Tensor, generated: bool = True) -> Tensor:
        """Network inputs [b, 3, H, W] float32 of uint8 images [b, 3, h, w]; H and W are the same for every h and w.

        Args:
            images: the images.
            generated: whether they are generated or real; some protocols treat them differently.
        """

    @abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """Features [b, d] float32 of preprocessed pixels [b, 3, H, W]."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able facts that the features depend on, for fingerprints; needs no loaded weights."""

    @property
    def key(self) -> str:
        """Tells features that are the same numbers from all others: the name and a hash of `describe` and own code."""
        canonical = json.dumps(facts_of(self), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"

    @property
    def features(self) -> Column:
        """The features of the images, named after the extractor."""
        return Column(f"{self.key}.features", self._of_batch, self.load, facts_of(self))

    def _of_batch(self, batch: ImageBatch) -> Tensor:
        return self(batch.images)

    def __call__(self, images: Tensor) -> Tensor:
        """Features [b, d] float32 of uint8 images [b, 3, h, w], on the extractor's device.

        Raises:
            ValueError: anything else than a uint8 batch.
        """
        check_images(images)
        return self.extract(self.preprocess(images))
