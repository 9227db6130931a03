"""Model families: how each is loaded, calibrated, drawn from and saved. A new file in this folder is a new family."""

from importlib import import_module
from pkgutil import iter_modules

from sdprune.pipelines.base import DiffusersFamily
from sdprune.pipelines.component import Component
from sdprune.pipelines.sampling import Drawn, Sampling

__all__ = ["Component", "DiffusersFamily", "Drawn", "Sampling"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
globals().update({cls.__name__: cls for cls in DiffusersFamily.__subclasses__()})
