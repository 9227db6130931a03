"""How well each image fits its prompt, by CLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.features.clip import ClipImageFeatures
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.paired import mean, paired_bootstrap, require_tolerance, standard_error
from sdprune.metrics.rows import Column, ImageBatch, Rows
from sdprune.metrics.scores.base import Score


class CLIPScore(Score):
    """Mean cosine of each image's and its prompt's CLIP embedding (not times 100); higher is better.

    Beside it the *gap*: how much better an image fits its own prompt than the other prompts of the run. The score
    alone has a large floor (unrelated pairs score about 0.1 to 0.2 with ViT-B/32); the gap of images that ignore
    their prompts is 0.

    Source: Hessel et al., "CLIPScore", EMNLP 2021, without its factor 2.5 and without its clipping at 0.

    Args:
        model: a directory, a hub id, or `miniature` for the evaluator that comes with this package.
        revision: branch, tag or commit of the hub repository; None means `main`.
        processor: directory or hub id of the tokenizer and the preprocessing; None means those of `model`. PickScore
            (Kirstain et al., 2023; its score is 100 times this one) is
            {model: yuvalkirstain/PickScore_v1, processor: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, name: pick_score}.
        name: key of the score in the results.
        resamples: bootstrap resamples of `compare`.
        tolerance: a pruned model may be worse by this share of the dense model's score (0.2 % is MLPerf's); null gives
            no verdict.
    """

    higher_is_better = True
    extractor: ClipImageFeatures

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        revision: str | None = None,
        processor: str | None = None,
        name: str = "clip_score",
        resamples: int = 1000,
        tolerance: float | None = 0.002,
    ) -> None:
        if resamples < 2:
            raise InputError(f"resamples must be at least 2, got {resamples}.")
        self.extractor = ClipImageFeatures(model, revision, processor)
        self.name = name
        self.resamples = resamples
        self.tolerance = require_tolerance(tolerance)

    @property
    def columns(self) -> Sequence[Column]:
        """Embeddings of the images and of their prompts, and which prompts are equal."""
        return (self.extractor.features, self.extractor.texts, Column("prompts", prompt_ids))

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """The titles of the score and the gap."""
        names = [self.name, self._gap_name]
        return names, [f"{name}_diff" for name in names]

    @property
    def _gap_name(self) -> str:
        return f"{self.name.removesuffix('_score')}_gap"

    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """`<name>`, its standard error `<name>_se` (two images or more) and `clip_gap` (two prompts or more)."""
        values = self._values(rows)
        scores = values[self.name]
        error = {f"{self.name}_se": standard_error(scores)} if len(scores) > 1 else {}
        return {name: mean(of_images) for name, of_images in values.items()} | error

    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """Score and gap minus the dense model's, each as `_diff`, `_diff_low`, `_diff_high`, `_diff_se`.

        Images are resampled in pairs. In the gap the other prompts stay those of the whole run.
        """
        prompts, dense_prompts = self.read(rows)[2], self.read(dense_rows)[2]
        if not prompts.equal(dense_prompts):
            differ = int((prompts != dense_prompts).sum())
            raise InputError(f"The dense record has other prompts at {differ} of {len(prompts)} positions.")
        dense = self._values(dense_rows)
        result: dict[str, float] = {}
        for name, values in self._values(rows).items():
            result |= paired_bootstrap(values, dense[name], mean, self.resamples).as_dict(f"{name}_diff")
        return result

    def describe(self) -> dict[str, Any]:
        """The CLIP model that scores."""
        return {**self.extractor.describe(), "class": "CLIPScore", "name": self.name}

    def per_image(self, rows: Rows) -> dict[str, Tensor]:
        """Score and gap of each image."""
        return self._values(rows)

    def _values(self, rows: Rows) -> dict[str, Tensor]:
        """Scores and gaps of the images by name, [n] each."""
        images, texts, prompts = self.read(rows)
        values, gaps = {self.name: cosine_scores(images, texts)}, prompt_gaps(images, texts, prompts)
        return values if gaps is None else values | {self._gap_name: gaps}


def prompt_ids(batch: ImageBatch) -> Tensor:
    """A signed 64-bit number for each prompt [b], which tells it from others: the head of the text's SHA-256."""
    heads = [hashlib.sha256(prompt.encode()).digest()[:8] for prompt in batch.texts()]
    return torch.tensor([int.from_bytes(head, "big", signed=True) for head in heads], dtype=torch.int64)


def cosine_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image's and its text's embedding [n, d], [n] float64."""
    return (_unit(images) * _unit(texts)).sum(1)


def prompt_gaps(images: Tensor, texts: Tensor, prompts: Tensor) -> Tensor | None:
    """For each image: own cosine minus the mean cosine with all differing prompts, [n] float64.

    g_i = cos(i, i) - mean over {j : prompt_j != prompt_i} of cos(image_i, text_j). None when all prompts are equal.
    A mean of cosines is the cosine with a mean, so n images cost n x d and not n x n.
    """
    images, texts = _unit(images), _unit(texts)
    _, group, sizes = prompts.cpu().unique(return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        return None
    same = torch.zeros(len(sizes), texts.shape[1], dtype=texts.dtype).index_add_(0, group, texts)
    others = (texts.sum(0) - same[group]) / (len(texts) - sizes[group])[:, None]
    return (images * (texts - others)).sum(1)


def _unit(embeddings: Tensor) -> Tensor:
    """Of length 1, float64; on the CPU, where `index_add_` adds in the same order each time."""
    return F.normalize(embeddings.cpu().double(), dim=1)
