"""Scores of generated images, and what their differences to the dense model's are worth.

A `Column` is one number or vector for each image; a `Score` is a function of columns and, for some, of real images;
`ImageScores` computes the columns of all scores, each once, over any number of processes.
"""

from sdprune.metrics import features, scores
from sdprune.metrics.features import FeatureExtractor
from sdprune.metrics.features.clip import ClipImageFeatures
from sdprune.metrics.features.inception import InceptionFeatures
from sdprune.metrics.frechet import Statistics, feature_statistics, frechet_distance
from sdprune.metrics.frechet_to import FrechetTo
from sdprune.metrics.image_scores import ImageScores
from sdprune.metrics.paired import Interval, mean, paired_bootstrap, standard_error, verdict
from sdprune.metrics.reference import reference_path, reference_statistics
from sdprune.metrics.rows import Column, ImageBatch, MeasuredRows, PerImageRows
from sdprune.metrics.scores import Score
from sdprune.metrics.scores.base import FeatureScore
from sdprune.metrics.scores.clip_score import CLIPScore
from sdprune.metrics.scores.dense_distance import DenseDistance
from sdprune.metrics.scores.fid import FrechetInceptionDistance
from sdprune.metrics.scores.fid_infinity import FrechetDistanceAtInfinity
from sdprune.metrics.scores.kernel import KernelInceptionDistance, MaximumMeanDiscrepancy
from sdprune.metrics.scores.precision_recall import PrecisionRecall
from sdprune.schema import discover

__all__ = [
    "CLIPScore", "ClipImageFeatures", "Column", "DenseDistance", "FeatureExtractor", "FeatureScore",
    "FrechetDistanceAtInfinity", "FrechetInceptionDistance", "FrechetTo", "ImageBatch", "ImageScores",
    "InceptionFeatures", "Interval", "KernelInceptionDistance", "MaximumMeanDiscrepancy", "MeasuredRows",
    "PerImageRows", "PrecisionRecall", "Score", "Statistics", "feature_statistics", "frechet_distance", "mean",
    "paired_bootstrap", "reference_path", "reference_statistics", "standard_error", "verdict",
]  # fmt: skip

for _folder in (features, scores):
    discover(_folder)
