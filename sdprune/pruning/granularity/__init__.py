"""Granularities: which weights are ranked against each other. A new file in this folder is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from sdprune.pruning.granularity.base import Granularity

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["Granularity"]
