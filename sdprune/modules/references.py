"""The real images that generated ones are compared with: their statistics, made once and shared by all runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.metrics import FrechetInceptionDistance, PerImageMetric, Statistics, reference_path, reference_statistics
from sdprune.record import require_writable

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from sdprune.data import CocoDataModule


class References:
    """The reference of every metric that wants one: the file that the data names, or `<output>/reference`.

    Args:
        metrics: all metrics of a run.
        output: directory of all runs.
    """

    def __init__(self, metrics: Sequence[PerImageMetric], output: str):
        self.metrics = [metric for metric in metrics if isinstance(metric, FrechetInceptionDistance)]
        self.cache = Path(output) / "reference"

    def check(self, data: CocoDataModule) -> bool:
        """Read what is there already; whether real images have to be read for the rest.

        Raises:
            InputError: damaged statistics, or a cache that cannot be written.
        """
        require_writable(self.cache, "--model.output")
        wanted = [metric for metric in self.metrics if metric.needs_reference]
        there = [path for metric in wanted if (path := self._path(metric, data)).exists()]
        for path in there:
            Statistics.load(path)
        return len(there) < len(wanted)

    def set(self, data: CocoDataModule, strategy: Strategy) -> None:
        """Give each metric its reference; the first process fills the cache, the others read it."""
        for metric in self.metrics:
            for turn in (True, False):
                if strategy.is_global_zero == turn and metric.needs_reference:
                    metric.set_reference(self._statistics(metric, data))
                strategy.barrier("reference")

    def describe(self, data: CocoDataModule) -> dict[str, dict[str, Any]]:
        """By metric, what it was measured against."""
        told = {}
        for metric in self.metrics:
            made = metric.reference
            facts = {} if made is None else {"n": made.n, "extractor": made.extractor, "source": made.source}
            told[metric.name] = {"images": data.reference, **facts}
        return told

    def _statistics(self, metric: FrechetInceptionDistance, data: CocoDataModule) -> Statistics:
        if data.reference_file is not None:
            return Statistics.load(data.reference_file)
        return reference_statistics(data.reference_images, metric.extractor, self.cache, _key(data))

    def _path(self, metric: FrechetInceptionDistance, data: CocoDataModule) -> Path:
        return data.reference_file or reference_path(metric.extractor, self.cache, _key(data))


def _key(data: CocoDataModule) -> dict[str, Any]:
    facts = data.describe()
    draw = ("n", "seed") if data.reference == "drawn" else ()
    return {key: facts[key] for key in ("source", "reference", *draw)}
