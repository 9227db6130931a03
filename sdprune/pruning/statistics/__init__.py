"""What criteria read of a layer's inputs. A new file in this folder is a new statistic."""

from importlib import import_module
from pkgutil import iter_modules

from sdprune.pruning.statistics.base import Statistic, statistic, statistic_class, statistic_names

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["Statistic", "statistic", "statistic_class", "statistic_names"]
