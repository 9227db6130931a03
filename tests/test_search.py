"""`sdprune search` through the command line: what it finds, goes on with, writes and refuses."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_lines import CONFIGS, CPU, predict, process, runs, the_run
from PIL import Image

SMALL = [
    "--data.n=48", "--data.batch_size=16", "--data.source.images=120", "--model.sampling.steps=1", CPU,
    "--data.calibration.images=20", "--data.calibration_n=4", "--model.levels={low: 0.02, high: 0.8, step: 0.39}",
]  # fmt: skip
DISTANCE = [
    "--model.score=DenseDistance", "--model.score.extractor=ClipImageFeatures", "--model.score.extractor.model=miniature",
    "--model.absolute=true",
]  # fmt: skip


def search(output, *options):
    """Three levels a component on the untrained miniature, by default by the squared error to the dense image."""
    score = [] if any("--model.score" in one for one in options) else [*DISTANCE, "--model.tolerance=0.1"]
    where = [f"--model.output={output}", f"--model.store={output}/statistics"]
    return ["search", "--config", str(CONFIGS / "search.yaml"), *SMALL, *score, *where, *options]


CLIP_SCORE = ["--model.score=CLIPScore", "--model.score.model=miniature", "--model.tolerance=0.02"]


def the_search(output) -> Path:
    (found,) = runs(output, "search-")
    return found


def found(output):
    return json.loads((the_search(output) / "results.json").read_text())["search"]


def scores_of(output):
    """Scores in order, by model and part."""
    table = {}
    with (the_search(output) / "scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            table.setdefault((row["model"], row["prompts"]), []).append(float(row["score"]))
    return table


@pytest.fixture(scope="module")
def whole(miniature, tmp_path_factory):
    """A search that was not interrupted."""
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("whole")
    assert main(search(output)) == 0
    return output


def wealth(excess, cap):
    """The betting formula in one loop, with its sums made anew for each image."""
    value = 1.0
    for i, one in enumerate(excess):
        mu = sum(excess[:i]) / (i + 4)
        v = (4 * (0.15 * cap) ** 2 + sum(x * x for x in excess[:i])) / (i + 4) - mu**2
        bet = min(max(-mu / (v + mu**2), 0), 0.95 / cap) if i else 0.3 / cap
        value *= 1 - bet * one
    return value


def test_every_verdict_follows_from_the_pictures(whole):
    """The scores are those of the files, and the tests those of the formula."""
    results, scores, images = found(whole), scores_of(whole), the_search(whole) / "images"
    assert results["cap"] == pytest.approx(1)
    certified = 0
    for probe in results["probes"]:
        losses = scores[probe["model"], probe["prompts"]][: probe["n"]]
        excess = [min(loss, 1) - 0.1 for loss in losses]
        evidence = wealth(excess, 1)
        assert probe["e_value"] == pytest.approx(evidence)
        assert (probe["verdict"] == "certified") == (evidence >= 1 / probe["alpha"])
        assert probe["loss"] == pytest.approx(np.minimum(losses, 1).mean())
        certified += probe["verdict"] == "certified"
    assert 0 < certified < len(results["probes"])
    for path in sorted(images.glob("*/*.png")):
        assert (images / "dense" / path.name).exists(), path
    sums = {
        name: sorted(
            np.square(read(path) - read(images / "dense" / path.name)).mean() for path in (images / name).glob("*.png")
        )
        for name in ("dense", results["answer"]["model"])
    }
    for name, values in sums.items():
        written = sorted(score for (model, _), some in scores.items() if model == name for score in some)
        assert values == pytest.approx(written)


def read(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_the_risk_is_shared_and_the_paths_are_those_of_the_levels(whole):
    results = found(whole)
    by_path = {}
    for probe in results["probes"]:
        by_path.setdefault(probe["path"], []).append(probe)
    levels = {0: 0.0, 1: 0.02, 2: 0.41, 3: 0.8}
    for name in ("text_encoder", "unet"):
        tested = {probe["sparsities"][name]: probe["verdict"] == "certified" for probe in by_path[name]}
        assert next(iter(tested)) == 0.41
        assert [probe["alpha"] for probe in by_path[name]] == [0.025] * 2
        reached = max((share for share, good in tested.items() if good), default=0.0)
        assert results["thresholds"][name] == ({name: reached} if reached else {})
    thresholds = [results["thresholds"][name][name] for name in ("text_encoder", "unet")]
    steps = [round((share - 0.02) / 0.39) for share in thresholds]
    joint = [[levels[step + 1 - back] for step in steps] for back in range(min(steps) + 1)]
    for probe in by_path["together"]:
        assert [probe["sparsities"][name] for name in ("text_encoder", "unet")] in joint
        assert probe["prompts"] == "search"
    for attempt, probe in enumerate(by_path["certificate"], 1):
        assert (probe["prompts"], probe["alpha"]) == ("certificate", 0.05 / 2**attempt)
    assert results["answer"]["path"] == "certificate"
    (also,) = by_path["also"]
    assert also["prompts"] == "certificate"
    assert also["sparsities"] == {"text_encoder": 0.475, "unet": 0.35}
    tests = {(probe["model"], probe["prompts"]): probe["n"] for probe in results["probes"]}
    assert results["images"]["pruned"] == sum(tests.values())
    assert results["images"]["grid"] == 48 * 7
    print(results["thresholds"], results["answer"]["model"], results["images"])
    import shutil

    shutil.rmtree("/tmp/scratch-search/whole", ignore_errors=True)
    shutil.copytree(whole, "/tmp/scratch-search/whole")


def test_prompts_of_the_certificate_were_never_looked_at(whole):
    """All models see one order of prompts; the dense model's pictures are as many as both parts need."""
    results, scores = found(whole), scores_of(whole)
    drawn = {part: len(scores["dense", part]) for part in ("search", "certificate")}
    names = {path.name for path in (the_search(whole) / "images" / "dense").iterdir()}
    assert len(names) == sum(drawn.values())
    answer = {path.name for path in (the_search(whole) / "images" / results["answer"]["model"]).iterdir()}
    searched = {path.name for path in (the_search(whole) / "images" / "unet-0.41").iterdir()}
    assert len(answer - searched) >= results["answer"]["n"]


def test_the_answer_can_be_made_again(whole, sdprune, tmp_path):
    """By predict, with the same masks and pictures, and by fit."""
    directory, answer = the_search(whole), found(whole)["answer"]
    told = sdprune("predict", "--config", directory / "config.yaml", f"--model.output={tmp_path}")
    assert told.code == 0, told.err
    run = the_run(tmp_path, "text_encoder")
    results = json.loads((run / "results.json").read_text())
    assert {name: one["mask_hash"] for name, one in results["pruning"].items()} == answer["masks"]
    same = [
        path for path in (directory / "images" / answer["model"]).iterdir() if (run / "images" / path.name).exists()
    ]
    assert len(same) >= 16
    for path in same:
        assert path.read_bytes() == (run / "images" / path.name).read_bytes()
    told = sdprune("fit", "--config", directory / "config_fit.yaml", f"--model.output={tmp_path}")
    assert told.code == 0, told.err
    (report,) = tmp_path.glob("pruned-*/pruning_report.json")
    assert json.loads(report.read_text())["sparsity"] == answer["sparsity"]


def test_a_finished_search_says_so_and_draws_nothing(whole, sdprune, monkeypatch):
    from sdprune.pipelines import StableDiffusion

    monkeypatch.setattr(StableDiffusion, "load", lambda *_: pytest.fail("loaded"))
    before = (the_search(whole) / "results.json").read_bytes()
    told = sdprune(*search(whole))
    assert told.code == 0, told.err
    assert "This search was finished already" in told.out
    assert "With 95 % confidence the loss in dense_mse is at most 0.1 at sparsity" in told.out
    assert (the_search(whole) / "results.json").read_bytes() == before
