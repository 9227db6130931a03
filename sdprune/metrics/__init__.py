"""Scores of generated images: FID, CLIP score, and what their differences are worth.

Every metric is a `PerImageMetric`: built from simple arguments without loading weights, then

    metric.prepare(device)                        # loads weights
    metric.set_reference(statistics)              # only where metric.needs_reference
    metric.update(images, prompts, positions)     # uint8 [b, 3, h, w], texts, places in the draw
    metric.compute()                              # {"fid": ...}
    metric.compare(dense_rows)                    # {"fid_diff": ..., "fid_diff_low": ..., "fid_diff_high": ...}
"""

from sdprune.metrics.base import PerImageMetric
from sdprune.metrics.clip import ClipModel
from sdprune.metrics.clip_score import CLIPScore
from sdprune.metrics.extractors import ClipImageFeatures, FeatureExtractor, InceptionFeatures
from sdprune.metrics.fid import FrechetInceptionDistance
from sdprune.metrics.frechet import Statistics, feature_statistics, frechet_distance
from sdprune.metrics.paired import FrechetTo, Interval, mean, paired_bootstrap, standard_error
from sdprune.metrics.reference import reference_path, reference_statistics

__all__ = [
    "CLIPScore",
    "ClipImageFeatures",
    "ClipModel",
    "FeatureExtractor",
    "FrechetInceptionDistance",
    "FrechetTo",
    "InceptionFeatures",
    "Interval",
    "PerImageMetric",
    "Statistics",
    "feature_statistics",
    "frechet_distance",
    "mean",
    "paired_bootstrap",
    "reference_path",
    "reference_statistics",
    "standard_error",
]
