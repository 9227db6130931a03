"""What watches a run."""

from sdprune.callbacks.progress import CalibrationProgress, ImageProgress
from sdprune.callbacks.record_writer import RecordWriter
from sdprune.callbacks.sample_grid import SampleGrid

__all__ = ["CalibrationProgress", "ImageProgress", "RecordWriter", "SampleGrid"]
