"""Model families: how each is loaded, calibrated, drawn from and saved. A new file in this folder is a new family."""

import sys

from sdprune.pipelines.base import DiffusersFamily
from sdprune.pipelines.component import Component
from sdprune.pipelines.sampling import Drawn, Sampling
from sdprune.schema import choices_of, discover

__all__ = ["Component", "DiffusersFamily", "Drawn", "Sampling"]

discover(sys.modules[__name__])
globals().update(choices_of([DiffusersFamily]))
