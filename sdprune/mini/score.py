"""How many images of the embedded world show what their captions say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.features.clip import directory_hash
from sdprune.metrics.features.inference import exact_inference
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.paired import mean, paired_bootstrap, require_tolerance, standard_error
from sdprune.metrics.rows import Column, ImageBatch, Rows
from sdprune.metrics.scores.base import Score
from sdprune.mini.captions import Content, parse
from sdprune.pipelines.resolve import resolve

if TYPE_CHECKING:
    from sdprune.mini.examiner import Examiner

_CATEGORIES = ("attribute", "object", "relation", "count", "background")
_SILENT = -1  # of a category that a caption says nothing of


class ExaminerScore(Score):
    """Share of images that show all that their captions say, as a detector reads them; higher is better.

    Beside it the share by category, over the captions that say something of it: `attribute` (one object: its colour,
    shape and size), `object` (two of them: the same), `relation` (where the two stand; only right with right objects),
    `count` (how many of a kind) and `background`.

    For captions of the embedded world alone.

    Source: Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", NeurIPS 2023.

    Args:
        examiner: `miniature` for the one that comes with this package, or a directory that holds another one.
        name: key of the score in the results.
        resamples: bootstrap resamples of `compare`.
        tolerance: a pruned model may be worse by this share of the dense model's score; null gives no verdict.
    """

    higher_is_better = True
    judges = True

    def __init__(
        self,
        examiner: str = "miniature",
        name: str = "correct",
        resamples: int = 1000,
        tolerance: float | None = None,
    ) -> None:
        if resamples < 2:
            raise InputError(f"resamples must be at least 2, got {resamples}.")
        self.examiner = examiner
        self.name = name
        self.resamples = resamples
        self.tolerance = require_tolerance(tolerance)
        self.device = torch.device("cpu")

    @property
    def columns(self) -> Sequence[Column]:
        """Of each image 1 for right, 0 for wrong, -1 for nothing said: all, then each category, int8 [n, 6]."""
        facts = self._facts
        return (Column(f"examiner-{facts['weights'][:8]}", self._judgements, self._load, facts),)

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """Of the score and of each category."""
        names = [self.name, *(f"{self.name}_{category}" for category in _CATEGORIES)]
        return names, [f"{name}_diff" for name in names]

    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """The shares, and the standard error `<name>_se` of the first; no share of what no caption speaks of."""
        values = self._values(rows)
        error = {f"{self.name}_se": standard_error(values[self.name])} if len(values[self.name]) > 1 else {}
        return {name: mean(of_images) for name, of_images in values.items()} | error

    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """Shares minus the dense model's, each as `_diff`, `_diff_low`, `_diff_high`, `_diff_se`.

        Images are resampled in pairs; of a category those whose captions speak of it.
        """
        (own,), (dense,) = self.read(rows), self.read(dense_rows)
        if not (own == _SILENT).equal(dense == _SILENT):
            raise InputError("The dense record has other prompts.")
        before = self._values(dense_rows)
        result: dict[str, float] = {}
        for name, values in self._values(rows).items():
            if len(values) > 1:
                result |= paired_bootstrap(values, before[name], mean, self.resamples).as_dict(f"{name}_diff")
        return result

    def per_image(self, rows: Rows) -> dict[str, Tensor]:
        """1 for right, 0 for wrong, NaN for nothing said."""
        (judged,) = self.read(rows)
        values = judged.double().masked_fill(judged == _SILENT, torch.nan)
        return dict(zip(self.titles[0], values.T, strict=True))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise InputError for a caption that is none of the world's."""
        _contents(prompts)

    def describe(self) -> dict[str, Any]:
        """The examiner's weights."""
        return {**self._facts, "class": "ExaminerScore", "name": self.name}

    @property
    def _directory(self) -> Path:
        return Path(resolve(self.examiner, "examiner"))

    @cached_property
    def _facts(self) -> dict[str, Any]:
        if not (self._directory / "model.safetensors").is_file():
            raise InputError(
                f"The examiner {str(self._directory)!r} has no model.safetensors. Give 'miniature', or a directory "
                "that sdprune fit --config mini/examiner wrote."
            )
        return {"weights": directory_hash(self._directory)}

    @cached_property
    def _network(self) -> Examiner:
        from sdprune.mini.examiner import Examiner

        return Examiner.load(self._directory)

    def _load(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._network.to(self.device)

    def _judgements(self, batch: ImageBatch) -> Tensor:
        from sdprune.mini.examiner import judge

        said = _contents(batch.texts())
        with exact_inference(self.device):
            readings = self._network.read(batch.images.to(self.device))
        found = [judge(content, reading) for content, reading in zip(said, readings, strict=True)]
        table = [[all(one.values()), *(one.get(category, _SILENT) for category in _CATEGORIES)] for one in found]
        return torch.tensor(table, dtype=torch.int8)

    def _values(self, rows: Rows) -> dict[str, Tensor]:
        """Zeros and ones of the images whose captions speak of it, by name."""
        spoken = {name: values[~values.isnan()] for name, values in self.per_image(rows).items()}
        return {name: values for name, values in spoken.items() if len(values)}


def _contents(prompts: Sequence[str]) -> list[Content]:
    said = [parse(text) for text in prompts]
    if None in said:
        raise InputError(
            f"ExaminerScore cannot read the caption {prompts[said.index(None)]!r}: it knows those of the embedded "
            "world only. Leave it out of --model.metrics."
        )
    return [content for content in said if content]
