"""Networks whose features of images are compared. A new file in this folder is found by itself."""

from sdprune.metrics.features.base import FeatureExtractor

__all__ = ["FeatureExtractor"]
