"""A finished run's differences to the dense record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdprune.identity import fingerprint
from sdprune.metrics import PerImageMetric, verdict
from sdprune.record import Record, require_comparable


class Comparison:
    """Differences of a record to the dense one, by every metric, from each image's rows in both.

    Args:
        metrics: hold the rows of `record`, and their reference.
        record: of the pruned model.
        baseline: of the dense model, finished.
    """

    def __init__(self, metrics: Sequence[PerImageMetric], record: Record, baseline: Record) -> None:
        self.metrics, self.record, self.baseline = metrics, record, baseline

    @property
    def key(self) -> str:
        """Tells one way of comparing from another; unlike what is drawn and measured, it decides no fingerprint."""
        how = [(metric.name, metric.tolerance, getattr(metric, "resamples", None)) for metric in self.metrics]
        return fingerprint({"dense": self.baseline.directory.name, "how": how})

    @property
    def done(self) -> bool:
        """Whether the record was compared in this very way."""
        return self.record.results.get("compared") == self.key

    def make(self) -> dict[str, Any]:
        """The sections of the results that a comparison fills.

        Raises:
            InputError: records that differ in more than what was pruned, or damaged rows.
        """
        require_comparable(self.record.facts, self.baseline.facts)
        differences: dict[str, Any] = {"dense": self.baseline.directory.name}
        for metric in self.metrics:
            rows = {k: torch.from_numpy(v) for k, v in self.baseline.load_rows(metric.keys()).items()}
            differences |= metric.compare(rows)
        return {"comparison": differences, "verdicts": self._verdicts(differences), "compared": self.key}

    def _verdicts(self, differences: Mapping[str, Any]) -> dict[str, Any]:
        """For scores with a tolerance: whether the difference stays inside."""
        told = {}
        for metric in self.metrics:
            low, high = (differences.get(f"{metric.name}_diff_{end}") for end in ("low", "high"))
            if metric.tolerance is None or low is None or high is None:
                continue
            dense = self.baseline.results["metrics"][metric.name]
            found = verdict(dense, low, high, metric.tolerance, bool(metric.higher_is_better))
            told[metric.name] = {"tolerance": metric.tolerance, "verdict": found}
        return told
