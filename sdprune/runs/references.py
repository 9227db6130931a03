"""The real images that generated ones are compared with: their features, made once and shared by all runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.errors import InputError
from sdprune.files import require_writable
from sdprune.locks import RunLock
from sdprune.metrics import FeatureExtractor, ImageScores, Score, Statistics, reference_path, reference_statistics
from sdprune.processes import Processes

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class References:
    """The reference of every score that needs one: the file that the data names, or `<output>/reference`.

    Args:
        scores: all scores of a run.
        output: directory of all runs.
    """

    def __init__(self, scores: ImageScores, output: str):
        self.scores = scores
        self.needed = [score for score in scores.scores if score.needs_reference]
        self.cache = Path(output) / "reference"

    def check(self, data: CocoDataModule) -> bool:
        """Read what is there already; whether real images have to be read for the rest.

        Raises:
            InputError: damaged statistics, such that a score cannot use, or a cache that cannot be written.
        """
        require_writable(self.cache, "--model.output")
        for score in self.needed:
            if data.reference_file is not None:
                self.scores.set_reference(score.name, Statistics.load(data.reference_file))
        return not all(self._there(score, data) for score in self.needed)

    def set(self, data: CocoDataModule, processes: Processes | None = None) -> None:
        """Give each score its reference, which one process of one run makes if it is not there."""
        made: dict[Path, Statistics] = {}  # scores of one extractor share it
        for score in self.needed:
            path = self._path(score, data)
            if path not in made:
                lock = RunLock(self.cache.parent, f"reference-{path.stem}", processes)
                with lock.making(lambda score=score: self._there(score, data)) as mine:  # type: ignore[misc]
                    if mine and lock.processes.is_first:
                        self._make(score, data)
                    lock.processes.barrier()
                made[path] = Statistics.load(path)
            self.scores.set_reference(score.name, made[path])

    def describe(self, data: CocoDataModule) -> dict[str, dict[str, Any]]:
        """By score, what it was measured against: which images, how many, by which protocol, with what result."""
        described = {}
        for score in self.needed:
            made = self.scores.references.get(score.name)
            facts = {} if made is None else {"n": made.n, "protocol": made.extractor, "hash": made.hash}
            described[score.name] = {"images": data.reference, **facts}
        return described

    def _there(self, score: Score, data: CocoDataModule) -> bool:
        path = self._path(score, data)
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
        return any(score.reference_features for score in self.needed)

    def _make(self, score: Score, data: CocoDataModule) -> None:
        key = _key(data)
        reference_statistics(
            data.reference_images, _extractor(score), self.cache, key, keep_features=self._keep_features
        )

    def _path(self, score: Score, data: CocoDataModule) -> Path:
        return data.reference_file or reference_path(_extractor(score), self.cache, _key(data))


def _extractor(score: Score) -> FeatureExtractor:
    assert score.extractor is not None
    return score.extractor


def _key(data: CocoDataModule) -> dict[str, Any]:
    return {"images": data.reference_digest}
