"""Allocations: one overall sparsity -> one per layer. A new file in this folder is found by itself."""

from sdprune.pruning.allocation.base import Allocation

__all__ = ["Allocation"]
