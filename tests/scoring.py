"""What the tests of metrics share: a cheap extractor, images, references, and scores of rows that are there already."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdprune.metrics import FeatureExtractor, Statistics, feature_statistics

D = 6


class PooledFeatures(FeatureExtractor):
    """Six fixed mixtures of a 2 x 2 thumbnail; counts the images that went through."""

    num_features = D
    name = "pooled"

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.batches: list[int] = []

    def load(self, device) -> None:
        pass

    def preprocess(self, images: Tensor, generated: bool = True) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 2)

    def extract(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        mix = torch.randn(12, D, dtype=torch.float32, generator=torch.Generator().manual_seed(self.version))
        return pixels.flatten(1) @ mix

    def describe(self) -> dict:
        return {"class": "PooledFeatures", "version": self.version}


FEATURES = PooledFeatures().features.key


def pictures(n: int, seed: int = 0, height: int = 8, width: int = 8) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def reference(rows: Tensor, features: bool = True) -> Statistics:
    made = feature_statistics(rows)
    return Statistics(made.mu, made.sigma, len(rows), None, rows if features else None)


class Measured:
    """A score of features that are there already, against real ones."""

    def __init__(self, score, rows: Tensor, real: Tensor) -> None:
        self.score, self.rows, self.reference = score, {score.columns[0].key: rows}, reference(real)
        score.check_reference(self.reference)

    def compute(self) -> dict[str, float]:
        return self.score.compute(self.rows, self.reference)

    def compare(self, dense: Tensor) -> dict[str, float]:
        return self.score.compare(self.rows, {self.score.columns[0].key: dense}, self.reference)
