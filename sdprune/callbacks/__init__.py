"""What watches a run."""

from sdprune.callbacks.progress import ImageProgress

__all__ = ["ImageProgress"]
