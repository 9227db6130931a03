"""Granularities: which weights are ranked against each other. A new file in this folder is found by itself."""

from sdprune.pruning.granularity.base import Granularity

__all__ = ["Granularity"]
