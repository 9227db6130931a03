"""All scores of a set of images, over any number of processes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from sdprune.errors import InputError
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.features.preprocess import check_images
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.rows import Column, ImageBatch, MeasuredRows, PerImageRows, Rows
from sdprune.metrics.scores.base import Score


class ImageScores(PerImageRows):
    """Computes every column that its scores read, once an image, and the scores from the columns.

    It is a torchmetrics Metric: update it in `predict_step`, and the images of all processes count.

        >>> import torch
        >>> from sdprune.metrics import ClipImageFeatures, CLIPScore, FrechetInceptionDistance, ImageBatch, ImageScores
        >>> from sdprune.metrics import feature_statistics
        >>> clip = ClipImageFeatures("miniature")
        >>> scores = ImageScores([FrechetInceptionDistance(clip), CLIPScore("miniature")])
        >>> scores.prepare("cpu")
        >>> noise = torch.Generator().manual_seed(0)
        >>> real, images = torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8, generator=noise)
        >>> scores.set_reference("fid", feature_statistics(clip(real)))
        >>> scores.update(ImageBatch(images, ["a red star", "a blue ring"] * 4, positions=range(8)))
        >>> sorted(scores.compute())
        ['clip_gap', 'clip_score', 'clip_score_se', 'fid']
        >>> scores.compare(scores.rows())["fid_diff"]
        0.0

    Args:
        scores: of different names. Those whose extractors give the same features come to share one of them.

    Raises:
        InputError: two scores of one name, or two different columns under one key.
    """

    def __init__(self, scores: Sequence[Score]) -> None:
        names = [score.name for score in scores]
        if len(set(names)) < len(names):
            raise InputError(f"Two metrics share a name among {names}: set `name` of one.")
        shared: dict[str, FeatureExtractor] = {}
        for score in scores:
            if score.extractor is not None:
                score.extractor = shared.setdefault(score.extractor.key, score.extractor)
        self.columns: dict[str, Column] = {}
        for column in (column for score in scores for column in score.columns):
            if self.columns.setdefault(column.key, column).facts != column.facts:
                raise InputError(f"Two different columns are kept under the key {column.key!r}: give one another key.")
        super().__init__(self.columns)
        self.scores = list(scores)
        self.references: dict[str, Statistics] = {}

    @property
    def needs_dense(self) -> bool:
        """Whether a column reads the dense model's images."""
        return any(column.needs_dense for column in self.columns.values())

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError for a score that needs more images than there are prompts, or cannot judge one of them."""
        for score in self.scores:
            if (n := len(prompts)) < score.minimum:
                name = score.name or type(score).__name__
                raise InputError(f"{name} needs at least {score.minimum} images, and n is {n}: leave it out.")
            score.check_prompts(prompts)

    def prepare(self, device: torch.device | str, keys: Collection[str] | None = None) -> None:
        """Load the weights of these columns, by default of all, on `device`, and keep the rows there."""
        self.to(device)
        for key in self.columns if keys is None else keys:
            self.columns[key].prepare(device)

    def set_reference(self, name: str, reference: Statistics) -> None:
        """Let the score of this name compare with these real images, the same on every process.

        Raises:
            InputError: a reference that the score cannot use.
        """
        next(score for score in self.scores if score.name == name).check_reference(reference)
        self.references[name] = reference
        self._computed = None

    def update(self, batch: ImageBatch, known: Rows | None = None) -> None:
        """Add images.

        Args:
            batch: the images.
            known: columns [b, ...] of these images that are there already, by key; only the others are computed.
        """
        check_images(batch.images)
        have = known or {}
        values = {key: have[key] if key in have else column.values(batch) for key, column in self.columns.items()}
        self.append(batch.positions, values)

    def compute(self) -> dict[str, float]:
        """All scores by name, of the images of all processes."""
        return {name: value for score in self.scores for name, value in self.compute_one(score).items()}

    def compute_one(self, score: Score) -> dict[str, float]:
        """What one score says of all images."""
        return score.compute(self._gathered(), self.references.get(score.name))

    def per_image(self, rows: Rows) -> dict[str, list[float]]:
        """Scores of single images [n] by name, where a score has them."""
        return {name: values.tolist() for score in self.scores for name, values in score.per_image(rows).items()}

    def compare(self, dense_rows: Rows) -> dict[str, float]:
        """Differences to a dense model's rows on the same prompts and noise, with 95 % intervals over images.

        Raises:
            InputError: another number of images or another width of rows.
        """
        return {name: value for part in self.compare_each(dense_rows).values() for name, value in part.items()}

    def compare_each(self, dense_rows: Rows) -> dict[str, dict[str, float]]:
        """The differences of `compare`, score by score."""
        own, dense = self._gathered() if self.scores else {}, self._checked(dense_rows)
        for key, column in own.items():
            if column.shape != dense[key].shape:
                raise InputError(
                    f"Cannot pair {key} {list(column.shape)} with the dense record's {list(dense[key].shape)}: compare "
                    "runs over the same prompts and metrics."
                )
        paired = MeasuredRows({key: dense[key].to(column.device) for key, column in own.items()})
        return {score.name: score.compare(own, paired, self.references.get(score.name)) for score in self.scores}
