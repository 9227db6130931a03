"""The real images that generated ones are compared with: their features, made once and shared by all runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.errors import InputError
from sdprune.locks import Claim
from sdprune.metrics import FeatureMetric, PerImageMetric, Statistics, reference_path, reference_statistics
from sdprune.record import require_writable

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class References:
    """The reference of every metric that wants one: the file that the data names, or `<output>/reference`.

    Args:
        metrics: all metrics of a run.
        output: directory of all runs.
    """

    def __init__(self, metrics: Sequence[PerImageMetric], output: str):
        self.metrics = [metric for metric in metrics if isinstance(metric, FeatureMetric)]
        self.cache = Path(output) / "reference"

    def check(self, data: CocoDataModule) -> bool:
        """Read what is there already; whether real images have to be read for the rest.

        Raises:
            InputError: damaged statistics, such that a metric cannot use, or a cache that cannot be written.
        """
        require_writable(self.cache, "--model.output")
        for metric in self.metrics:
            if data.reference_file is not None:
                metric.set_reference(Statistics.load(data.reference_file))
        return not all(self._there(metric, data) for metric in self.metrics)

    def set(self, data: CocoDataModule, claim: Callable[[str], Claim]) -> None:
        """Give each metric its reference, which one process of one run makes if it is not there."""
        made: dict[Path, Statistics] = {}  # metrics of one extractor share it
        for metric in self.metrics:
            path = self._path(metric, data)
            if path not in made:
                right = claim(f"reference-{path.stem}")
                if right.acquire(lambda metric=metric: self._there(metric, data)):  # type: ignore[misc]
                    if right.first:
                        self._make(metric, data)
                    right.everyone(None)
                    right.release()
                made[path] = Statistics.load(path)
            metric.set_reference(made[path])

    def describe(self, data: CocoDataModule) -> dict[str, dict[str, Any]]:
        """By metric, what it was measured against: which images, how many, by which protocol, with what result."""
        told = {}
        for metric in self.metrics:
            made = metric.reference
            facts = {} if made is None else {"n": made.n, "protocol": made.extractor, "hash": made.hash}
            told[metric.name] = {"images": data.reference, **facts}
        return told

    def _there(self, metric: FeatureMetric, data: CocoDataModule) -> bool:
        path = self._path(metric, data)
        if not path.exists():
            return False
        try:
            statistics = Statistics.load(path)
        except InputError as error:
            if path == data.reference_file:
                raise
            raise InputError(f"{path} is damaged: delete it, and it is made again.") from error
        return statistics.features is not None or not self._keep_features or path == data.reference_file

    @property
    def _keep_features(self) -> bool:
        return any(metric.reference_features for metric in self.metrics)

    def _make(self, metric: FeatureMetric, data: CocoDataModule) -> None:
        key = _key(data)
        reference_statistics(
            data.reference_images, metric.extractor, self.cache, key, keep_features=self._keep_features
        )

    def _path(self, metric: FeatureMetric, data: CocoDataModule) -> Path:
        return data.reference_file or reference_path(metric.extractor, self.cache, _key(data))


def _key(data: CocoDataModule) -> dict[str, Any]:
    return {"images": data.reference_digest}
