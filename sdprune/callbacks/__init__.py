"""What watches a run."""

from sdprune.callbacks.progress import CalibrationProgress, ImageProgress

__all__ = ["CalibrationProgress", "ImageProgress"]
