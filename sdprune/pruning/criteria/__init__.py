"""Criteria: how much each weight matters. A new file in this folder is found by itself."""

from sdprune.pruning.criteria.base import Criterion

__all__ = ["Criterion"]
