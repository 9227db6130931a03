"""The study's three LightningModules: thin shells around pipelines, pruning and metrics."""

from sdprune.modules.base import FrozenModule
from sdprune.modules.calibration import CalibrationModule
from sdprune.modules.generation import GenerationModule
from sdprune.modules.pruning import PruningModule

__all__ = ["CalibrationModule", "FrozenModule", "GenerationModule", "PruningModule"]
