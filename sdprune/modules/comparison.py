"""A finished run's differences to the dense record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sdprune.identity import fingerprint
from sdprune.metrics import ImageScores, verdict
from sdprune.record import Record, require_comparable


class Comparison:
    """Differences of a record to the dense one, by every score, from each image's rows in both.

    Args:
        scores: hold the rows of `record`, and their references.
        record: of the pruned model.
        baseline: of the dense model, finished.
    """

    def __init__(self, scores: ImageScores, record: Record, baseline: Record) -> None:
        self.scores, self.record, self.baseline = scores, record, baseline

    @property
    def key(self) -> str:
        """Tells one way of comparing from another; unlike what is drawn and measured, it decides no fingerprint."""
        how = [(score.name, score.tolerance, getattr(score, "resamples", None)) for score in self.scores.scores]
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
        dense_rows = kept_rows(self.baseline, self.scores)
        differences = {"dense": self.baseline.directory.name, **self.scores.compare(dense_rows)}
        return {"comparison": differences, "verdicts": self._verdicts(differences), "compared": self.key}

    def _verdicts(self, differences: Mapping[str, Any]) -> dict[str, Any]:
        """For scores with a tolerance: whether the difference stays inside."""
        told = {}
        for score in self.scores.scores:
            low, high = (differences.get(f"{score.name}_diff_{end}") for end in ("low", "high"))
            if score.tolerance is None or low is None or high is None:
                continue
            dense = self.baseline.results["metrics"][score.name]
            found = verdict(dense, low, high, score.tolerance, bool(score.higher_is_better))
            told[score.name] = {"tolerance": score.tolerance, "verdict": found}
        return told


def kept_rows(record: Record, scores: ImageScores) -> dict[str, torch.Tensor]:
    """The rows of a record that these scores read."""
    rows = record.load_rows({key: key for key in scores.keys})
    return {key: torch.from_numpy(values) for key, values in rows.items()}
