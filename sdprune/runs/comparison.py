"""A finished run's differences to another one, usually the dense model's; no trainer is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sdprune.errors import InputError
from sdprune.identity import fingerprint
from sdprune.metrics import ImageScores, Score, verdict
from sdprune.runs.record import Record

COMPARED = ("version", "pipeline", "dtype", "data", "seed", "sampling")
"""The facts that records which are compared have in common: all but what was pruned and how."""


class Comparison:
    """Differences of a record to its baseline, by every score, from each image's rows in both.

    Args:
        record: finished.
        baseline: finished, on the same prompts and noise.
        scores: with their references; where they hold no rows, those of the record are loaded.
        same_model: whether both have to be prunings of one model.
    """

    def __init__(self, record: Record, baseline: Record, scores: ImageScores, same_model: bool = True) -> None:
        self.record, self.baseline, self.scores, self.same_model = record, baseline, scores, same_model

    def _key(self, score: Score) -> str:
        """Tells one way of comparing a score from another."""
        scored = [record.results["scored"].get(score.name) for record in (self.record, self.baseline)]
        how = [score.tolerance, getattr(score, "resamples", None)]
        return fingerprint({"dense": self.baseline.directory.name, "how": how, "scored": scored})

    @property
    def done(self) -> bool:
        """Whether every score was compared in this very way."""
        compared = self.record.results.get("compared", {})
        return all(compared.get(score.name, {}).get("key") == self._key(score) for score in self.scores.scores)

    def write(self) -> None:
        """Add the differences to the record; those of other scores to the same baseline stay.

        Raises:
            InputError: records that differ in more than what was pruned, or damaged rows.
        """
        names = [score.name for score in self.scores.scores]
        require_comparable(self.record, self.baseline, self.same_model, names)
        if not self.scores.positions and self.scores.scores:
            self.scores.load_rows(self._rows(self.record))
        found = self.scores.compare_each(self._rows(self.baseline))
        compared: dict[str, Any] = {
            score.name: {"key": self._key(score), "values": found[score.name]} for score in self.scores.scores
        }
        results, dense = self.record.results, self.baseline.directory.name
        if results["comparison"].get("dense") == dense:
            compared = {**results.get("compared", {}), **compared}
        differences = {name: value for one in compared.values() for name, value in one["values"].items()}
        verdicts = {name: one for name, one in results["verdicts"].items() if name in compared and name not in names}
        sections = {
            "comparison": {"dense": dense, **differences},
            "verdicts": {**verdicts, **self._verdicts(differences)},
        }
        self.record.finish({**results, **sections, "compared": compared})

    def _rows(self, record: Record) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(values) for key, values in record.rows(self.scores.keys).items()}

    def _verdicts(self, differences: Mapping[str, Any]) -> dict[str, Any]:
        """For scores with a tolerance: whether the difference stays inside."""
        found = {}
        for score in self.scores.scores:
            low, high = (differences.get(f"{score.name}_diff_{end}") for end in ("low", "high"))
            if score.tolerance is None or low is None or high is None:
                continue
            dense = self.baseline.results["metrics"][score.name]
            stands = verdict(dense, low, high, score.tolerance, bool(score.higher_is_better))
            found[score.name] = {"tolerance": score.tolerance, "verdict": stands}
        return found


def protocol(results: Mapping[str, Any]) -> dict[str, Any]:
    """How each score of finished results was measured, whatever it was compared with."""
    return {
        name: {key: value for key, value in facts.items() if key != "baseline"}
        for name, facts in results.get("scored", {}).items()
    }


def require_comparable(one: Record, other: Record, same_model: bool = True, scores: Iterable[str] = ()) -> None:
    """See that two records differ in nothing but what was pruned and how.

    Args:
        one: a record.
        other: what it is compared with.
        same_model: whether both have to be of one model.
        scores: names of those that are compared; both records are finished then.

    Raises:
        InputError: what differs, with both values: prompts, noise, sampling, model or how it was measured.
    """
    names = list(scores)
    ours, theirs = (protocol(record.results) if names else {} for record in (one, other))
    pairs = [
        (name, one.facts.get(name), other.facts.get(name)) for name in COMPARED if same_model or name != "pipeline"
    ]
    pairs += [(f"scored.{name}", ours.get(name), theirs.get(name)) for name in names]
    for name, mine, its in pairs:
        if mine != its:
            key, own, others = next(_differences(name, mine, its))
            raise InputError(
                f"These records cannot be compared: {key} is {own!r} in one and {others!r} in the other. Draw both "
                "from the same prompts and noise, and measure both by the same protocol."
            )


def _differences(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, by dotted name."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from _differences(f"{name}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{name}.{number}", a, b)
    elif one != other:
        yield name, one, other
