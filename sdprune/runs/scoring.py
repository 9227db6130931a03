"""What a record has of the scores that a run wants, and what is still to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdprune.data import Batch
from sdprune.identity import SCORING, facts_of, package_code
from sdprune.metrics import ImageBatch, ImageScores, Score
from sdprune.processes import Processes
from sdprune.runs.record import Record

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class Scoring:
    """Brings the scores of a record up to what a run wants; what was measured in the very same way stays.

    Args:
        scores: that are wanted.
        record: that they go to.
        data: has the real images.
    """

    def __init__(self, scores: ImageScores, record: Record, data: CocoDataModule) -> None:
        self.scores, self.record, self.data = scores, record, data
        self.baseline: Record | None = None
        """The record whose pictures columns may read."""
        self.keys: list[str] = []
        """Columns that are to be measured."""
        self.stale_scores: list[Score] = []
        """Scores that are to be computed."""
        self.rows: dict[str, Tensor] = {}
        """Columns that the record has, whatever reads them."""
        self._codes = {"code": package_code(*SCORING)}

    def facts(self, score: Score) -> dict[str, Any]:
        """What decides a score, beside the pictures."""
        needed = {"reference": self.data.reference_digest} if score.needs_reference else {}
        return {
            **self._codes,
            **facts_of(score),
            **needed,
            **self._other(column.needs_dense for column in score.columns),
        }

    def column_facts(self, key: str) -> dict[str, Any]:
        """What decides the values of a column, beside the pictures."""
        column = self.scores.columns[key]
        return {**self._codes, **column.facts, **self._other([column.needs_dense])}

    def _other(self, needs_dense: Any) -> dict[str, Any]:
        if not any(needs_dense):
            return {}
        return {"baseline": None if self.baseline is None else self.baseline.directory.name}

    def stale(self, results: Mapping[str, Any]) -> list[Score]:
        """The scores that finished results lack, or have by another protocol."""
        scored = results.get("scored", {})
        kept = self.record.column_facts() if scored else {}
        return [
            score
            for score in self.scores.scores
            if scored.get(score.name) != self.facts(score)
            or any(kept.get(column.key) != self.column_facts(column.key) for column in score.columns)
        ]

    def missing(self, samples: Sequence[str]) -> list[str]:
        """What the record lacks of `images`, `samples` (the pictures of these prompts) and `scores`."""
        if not self.record.finished:
            return ["images", "samples", "scores"]
        results = self.record.results
        stale = {"samples": results.get("samples") != list(samples), "scores": bool(self.stale(results))}
        return [part for part, missing in stale.items() if missing]

    def begin(self, draws: bool) -> None:
        """Find out what is to be measured.

        Args:
            draws: whether pictures are drawn, so that nothing that was measured counts.
        """
        self.stale_scores = self.stale({} if draws else self.record.results)
        self._kept = {} if draws else self.record.column_facts()
        rows = {} if draws else self.record.rows()
        self.rows = {key: torch.from_numpy(rows[key]) for key in rows if key not in ("ids", "facts")}
        self.keys = [key for key in self.scores.columns if self._kept.get(key) != self.column_facts(key)]

    def prepare(self, device: torch.device) -> None:
        """Load the networks that are needed."""
        self.scores.reset()
        self.scores.prepare(device, self.keys)

    @property
    def reads_dense(self) -> bool:
        """Whether a column that is to be measured reads the baseline's pictures."""
        return any(self.scores.columns[key].needs_dense for key in self.keys)

    def update(self, batch: Batch, images: Tensor, dense: Tensor | None) -> None:
        """Measure the pictures of a batch, uint8 [b, 3, h, w]."""
        positions = batch.positions[: batch.valid]
        known = {key: self.rows[key][positions] for key in self.scores.columns if key not in self.keys}
        pictures = ImageBatch(images.to(self.scores.device), batch.prompts[: batch.valid], positions, dense)
        self.scores.update(pictures, known)

    def compute(self) -> dict[str, float]:
        """The stale scores, which the processes share among themselves; collective."""
        processes = Processes()
        if self.keys or not self.rows:
            self.scores.gather()
        else:
            self.scores.load_rows(self.rows)
        sharing = min(processes.world_size, len(self.stale_scores))
        numbers = range(processes.rank, len(self.stale_scores), sharing) if processes.rank < sharing else ()
        computed_here = {number: self.scores.compute_one(self.stale_scores[number]) for number in numbers}
        computed = {number: values for part in processes.all_gather(computed_here) for number, values in part.items()}
        return {name: value for number in sorted(computed) for name, value in computed[number].items()}

    def save(self, invalid: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Write what the record keeps of every image, and return it.

        Args:
            invalid: rows of `InvalidImages`, where pictures were drawn.
        """
        rows = {**self.rows, **self.scores.rows(), **invalid}
        facts = {**self._kept, **{key: self.column_facts(key) for key in self.scores.columns}}
        ids = list(self.data.examples["id"])
        self.record.save_rows(ids, {key: values.numpy() for key, values in rows.items()}, facts)
        return rows
