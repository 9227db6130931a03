"""Scores of generated images, and what their differences to the dense model's are worth.

Every metric is a `PerImageMetric`: built from simple arguments without loading weights, then

    metric.prepare(device)                        # loads weights
    metric.set_reference(statistics)              # of a FeatureMetric: real images
    metric.update(images, prompts, positions)     # uint8 [b, 3, h, w], texts, places in the draw
    metric.compute()                              # {"fid": ...}
    metric.compare(dense_rows)                    # {"fid_diff": ..., "fid_diff_low": ..., "fid_diff_high": ...}
"""

from sdprune.metrics.base import PerImageMetric, PerImageRows, share_extractors
from sdprune.metrics.clip import ClipModel
from sdprune.metrics.clip_score import CLIPScore
from sdprune.metrics.dense_distance import DenseDistance
from sdprune.metrics.extractors import ClipImageFeatures, FeatureExtractor, InceptionFeatures
from sdprune.metrics.feature_metric import FeatureMetric
from sdprune.metrics.fid import FrechetDistanceAtInfinity, FrechetInceptionDistance
from sdprune.metrics.frechet import Statistics, feature_statistics, frechet_distance
from sdprune.metrics.frechet_to import FrechetTo
from sdprune.metrics.kernel import KernelInceptionDistance, MaximumMeanDiscrepancy
from sdprune.metrics.paired import Interval, mean, paired_bootstrap, standard_error, verdict
from sdprune.metrics.precision_recall import PrecisionRecall
from sdprune.metrics.reference import reference_path, reference_statistics

__all__ = [
    "CLIPScore",
    "ClipImageFeatures",
    "ClipModel",
    "DenseDistance",
    "FeatureExtractor",
    "FeatureMetric",
    "FrechetDistanceAtInfinity",
    "FrechetInceptionDistance",
    "FrechetTo",
    "InceptionFeatures",
    "Interval",
    "KernelInceptionDistance",
    "MaximumMeanDiscrepancy",
    "PerImageMetric",
    "PerImageRows",
    "PrecisionRecall",
    "Statistics",
    "feature_statistics",
    "frechet_distance",
    "mean",
    "paired_bootstrap",
    "reference_path",
    "reference_statistics",
    "share_extractors",
    "standard_error",
    "verdict",
]
