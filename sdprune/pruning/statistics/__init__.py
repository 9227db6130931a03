"""What criteria read of a layer's inputs. A new file in this folder is a new statistic."""

from sdprune.pruning.statistics.base import InputStatistic, Statistic, statistic, statistic_class, statistic_names

__all__ = ["InputStatistic", "Statistic", "statistic", "statistic_class", "statistic_names"]
