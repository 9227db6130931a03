"""Scores of images. A new file in this folder is found by itself."""

from sdprune.metrics.scores.base import Score

__all__ = ["Score"]
