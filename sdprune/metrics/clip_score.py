"""How well each image fits its prompt, by CLIP."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.base import PerImageMetric
from sdprune.metrics.clip import ClipModel
from sdprune.metrics.extractors import ClipImageFeatures
from sdprune.metrics.paired import mean, paired_bootstrap, require_tolerance, standard_error


class CLIPScore(PerImageMetric):
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

    columns = ("image_embeddings", "text_embeddings", "prompt_ids")
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
        super().__init__()
        if resamples < 2:
            raise InputError(f"resamples must be at least 2, got {resamples}.")
        self.extractor = ClipImageFeatures(model, revision, processor)
        self.name = name
        self.resamples = resamples
        self.tolerance = require_tolerance(tolerance)

    @property
    def clip(self) -> ClipModel:
        """The model that embeds images and prompts."""
        return self.extractor.clip

    def keys(self) -> dict[str, str]:
        """Named after the model and the run's prompts, so that a record keeps them once."""
        key = self.extractor.key
        return {
            "image_embeddings": f"{key}.features", "text_embeddings": f"{key}.texts", "prompt_ids": "prompts"
        }  # fmt: skip

    def prepare(self, device: torch.device | str) -> None:
        """Load the CLIP model on `device`."""
        self.to(device)
        self.clip.load(device)

    def update(
        self,
        images: Tensor,
        prompts: Sequence[str] | None,
        positions: Tensor | Sequence[int],
        features: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        """Add uint8 images [b, 3, h, w] with their prompts [b] at their positions [b] in the draw.

        Raises:
            ValueError: no prompts, or not one for each image.
        """
        if prompts is None or len(prompts) != len(images):
            raise ValueError(
                f"CLIPScore needs one prompt an image: {len(images)} images, {len(prompts or [])} prompts."
            )
        embedded = self.extractor(images) if features is None else features
        self.update_features(embedded, self.clip.text_embeddings(prompts), prompts, positions)

    def update_features(
        self, images: Tensor, texts: Tensor, prompts: Sequence[str], positions: Tensor | Sequence[int]
    ) -> None:
        """Add embeddings [b, d] that were computed elsewhere, not necessarily normalised."""
        ids = torch.tensor([prompt_id(prompt) for prompt in prompts], dtype=torch.int64)
        self.append(positions, image_embeddings=images, text_embeddings=texts, prompt_ids=ids)

    def compute(self) -> dict[str, float]:
        """`<name>`, its standard error `<name>_se` (two images or more) and `clip_gap` (two prompts or more)."""
        rows = self.rows()
        scores, gaps = cosine_scores(rows), prompt_gaps(rows)
        result = {self.name: mean(scores)}
        if len(scores) > 1:
            result[f"{self.name}_se"] = standard_error(scores)
        if gaps is not None:
            result[self._gap_name] = mean(gaps)
        return result

    def scores(self) -> Tensor:
        """Cosine of each image and its prompt, [n] float64, by position."""
        return cosine_scores(self.rows())

    def gap(self) -> float | None:
        """Mean over images of own cosine minus mean cosine with the other prompts; None with one prompt only."""
        gaps = prompt_gaps(self.rows())
        return None if gaps is None else mean(gaps)

    def compare(self, dense_rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Score and gap minus the dense model's, each as `_diff`, `_diff_low`, `_diff_high`, `_diff_se`.

        Images are resampled in pairs. In the gap the other prompts stay those of the whole run.
        """
        own, dense = self._paired(dense_rows)
        if not own["prompt_ids"].equal(dense["prompt_ids"]):
            differ = int((own["prompt_ids"] != dense["prompt_ids"]).sum())
            raise InputError(f"The dense record has other prompts at {differ} of {len(own['prompt_ids'])} positions.")
        pairs = {self.name: (cosine_scores(own), cosine_scores(dense))}
        own_gaps, dense_gaps = prompt_gaps(own), prompt_gaps(dense)
        if own_gaps is not None and dense_gaps is not None:
            pairs[self._gap_name] = (own_gaps, dense_gaps)
        result: dict[str, float] = {}
        for name, (pruned, unpruned) in pairs.items():
            result |= paired_bootstrap(pruned, unpruned, mean, self.resamples).as_dict(f"{name}_diff")
        return result

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """Of the score and the gap."""
        names = [self.name, self._gap_name]
        return names, [f"{name}_diff" for name in names]

    def describe(self) -> dict[str, Any]:
        """The CLIP model that scores."""
        return {"class": "CLIPScore", "name": self.name, **self.clip.describe()}

    @property
    def _gap_name(self) -> str:
        return f"{self.name.removesuffix('_score')}_gap"


def prompt_id(prompt: str) -> int:
    """A signed 64-bit number that tells prompts apart: the head of the text's SHA-256."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big", signed=True)


def cosine_scores(rows: Mapping[str, Tensor]) -> Tensor:
    """Cosine of image and text embedding of each row, [n] float64."""
    images, texts = _unit(rows)
    return (images * texts).sum(1)


def prompt_gaps(rows: Mapping[str, Tensor]) -> Tensor | None:
    """For each image: own cosine minus the mean cosine with all differing prompts, [n] float64.

    g_i = cos(i, i) - mean over {j : prompt_j != prompt_i} of cos(image_i, text_j). None when all prompts are equal.
    A mean of cosines is the cosine with a mean, so n images cost n x d and not n x n.
    """
    images, texts = _unit(rows)
    _, group, sizes = rows["prompt_ids"].unique(return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        return None
    same = torch.zeros(len(sizes), texts.shape[1], dtype=texts.dtype).index_add_(0, group, texts)
    others = (texts.sum(0) - same[group]) / (len(texts) - sizes[group])[:, None]
    return (images * (texts - others)).sum(1)


def _unit(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    images, texts = (F.normalize(rows[f"{kind}_embeddings"].double(), dim=1) for kind in ("image", "text"))
    return images, texts
