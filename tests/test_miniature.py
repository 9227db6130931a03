"""The shipped miniature is good, and behaves as a subject of pruning should. Nothing here runs on random weights."""

from functools import cache

import numpy as np
import pytest
import torch
from geometry import classify

from sdprune import PruneSpec, prune
from sdprune.metrics import (
    ClipImageFeatures,
    CLIPScore,
    FrechetInceptionDistance,
    ImageBatch,
    ImageScores,
    feature_statistics,
)
from sdprune.mini.examine import GOALS, measure
from sdprune.mini.world import scenes
from sdprune.pipelines import Sampling, StableDiffusion
from sdprune.pipelines.resolve import SHIPPED, resolve
from sdprune.pipelines.sampling import image_seed

SAMPLING = Sampling(steps=20, guidance=2.5)
N = 128
BATCH = 64


@pytest.fixture(autouse=True)
def shipped_weights(monkeypatch):
    monkeypatch.delenv("SDPRUNE_MINIATURE", raising=False)


def pipeline() -> StableDiffusion:
    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    return model


def draw(model: StableDiffusion, captions: list[str]) -> torch.Tensor:
    """Images of captions, in batches; noise by place in the list."""
    seeds = [image_seed(0, place) for place in range(len(captions))]
    starts = range(0, len(captions), BATCH)
    return torch.cat([model.generate(captions[i : i + BATCH], seeds[i : i + BATCH], SAMPLING).images for i in starts])


def real(chosen) -> torch.Tensor:
    return torch.stack([torch.tensor(scene.render()).permute(2, 0, 1) for scene in chosen])


@cache
def held_out_scenes():
    return list(scenes("val", N, seed=11))


@cache
def real_features():
    extractor = ClipImageFeatures("miniature")
    extractor.load("cpu")
    return feature_statistics(extractor(real(scenes("val", 1_000, seed=12))))


def scored(images: torch.Tensor) -> ImageScores:
    captions = [scene.captions[0] for scene in held_out_scenes()]
    scores = ImageScores([CLIPScore("miniature"), FrechetInceptionDistance(ClipImageFeatures("miniature"))])
    scores.set_reference("fid", real_features())
    scores.update(ImageBatch(images, captions, range(len(captions))))
    return scores


@cache
def pruned(component: str | None, sparsity: float) -> ImageScores:
    model = pipeline()
    if component:
        prune(model.components[component], PruneSpec(sparsity=sparsity))
    return scored(draw(model, [scene.captions[0] for scene in held_out_scenes()]))


def test_weights_are_small_and_half_precision() -> None:
    from pathlib import Path

    from safetensors import safe_open

    files = [
        path
        for part in ("pipeline", "evaluator", "examiner")
        for path in Path(resolve("miniature", part)).rglob("*.safetensors")
    ]
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) <= 32e6
    for path in files:
        with safe_open(path, "pt") as content:
            assert {content.get_slice(key).get_dtype() for key in content.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_it_reaches_its_goals_on_what_training_never_saw() -> None:
    found = measure(SHIPPED, 512, 21, SAMPLING.steps, SAMPLING.guidance, "val")
    short = {name: found[name] for name, goal in GOALS.items() if found[name][0] < goal}
    assert not short


def test_the_dense_model_draws_the_colour_and_shape_it_is_told() -> None:
    single = [scene for scene in scenes("val", 400, seed=14) if len(scene.things) == 1][:N]
    images = draw(pipeline(), [scene.captions[0] for scene in single]).permute(0, 2, 3, 1).numpy()
    right = [
        (found.colour, found.shape) == scene.content.kinds[0][1:]
        for scene, found in zip(single, map(classify, images), strict=True)
    ]
    assert np.mean(right) >= 0.9


def test_the_dense_gap_is_near_that_of_real_pictures() -> None:
    dense, truth = pruned(None, 0.0).compute(), scored(real(held_out_scenes())).compute()
    assert dense["clip_gap"] >= 0.9 * truth["clip_gap"]


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_little_pruning_costs_little(component: str) -> None:
    assert pruned(component, 0.2).compute()["clip_gap"] >= 0.98 * pruned(None, 0.0).compute()["clip_gap"]


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_heavy_pruning_is_clearly_worse(component: str) -> None:
    differences = pruned(component, 0.9).compare(pruned(None, 0.0).rows())
    assert differences["clip_score_diff_high"] < 0
    assert differences["fid_diff_low"] > 0
