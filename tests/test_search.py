"""`sdprune search` through the command line: what it finds, goes on with, writes and refuses."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_lines import CONFIGS, CPU, process, runs, the_run
from PIL import Image

SMALL = [
    "--data.n=48", "--data.batch_size=16", "--data.source.images=120", "--model.sampling.steps=1", CPU,
    "--data.calibration.images=20", "--data.calibration_n=4", "--model.levels={low: 0.02, high: 0.8, step: 0.39}",
]  # fmt: skip
DISTANCE = [
    "--model.score=DenseDistance", "--model.score.extractor=ClipImageFeatures",
    "--model.score.extractor.model=miniature", "--model.absolute=true",
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


ONE = ["--model.prune={unet: {}}", "--model.also={unet: 0.35}"]
"""One component alone: two tests, and one more model."""


@pytest.fixture(scope="module")
def alone(miniature, tmp_path_factory):
    """A search of one component that was not interrupted."""
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("alone")
    assert main(search(output, *ONE)) == 0
    return output


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
        assert results["thresholds"][name] == ({name: reached} if reached else None)
    thresholds = [results["thresholds"][name][name] for name in ("text_encoder", "unet")]
    steps = [round((share - 0.02) / 0.39) for share in thresholds]
    joint = [[levels[step + 1 - back] for step in steps] for back in range(min(steps) + 1)]
    first = joint.index([by_path["certificate"][0]["sparsities"][name] for name in ("text_encoder", "unet")])
    for attempt, probe in enumerate(by_path["certificate"], 1):
        assert [probe["sparsities"][name] for name in ("text_encoder", "unet")] == joint[first + attempt - 1]
        assert (probe["prompts"], probe["alpha"]) == ("certificate", 0.05 / 2**attempt)
    assert results["answer"]["path"] == "certificate"
    (also,) = by_path["also"]
    assert also["prompts"] == "certificate"
    assert also["sparsities"] == {"text_encoder": 0.475, "unet": 0.35}
    tests = {(probe["model"], probe["prompts"]): probe["n"] for probe in results["probes"]}
    assert results["images"]["pruned"] == sum(tests.values())
    assert results["images"]["grid"] == 48 * 7


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
    # Its pictures are those of the certificate, whose prompts follow those of the search.
    words = ["--config", directory / "config.yaml", "--data.n=96"]
    told = sdprune("predict", *words, f"--model.output={tmp_path}")
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


def verdicts(output):
    """What the tests came to, which depends on no number of processes and no interruption."""
    results = found(output)
    return [results[name] for name in ("probes", "thresholds", "answer", "also", "claims", "shapes", "remarks")]


def pictures(output):
    return {path: path.stat().st_mtime_ns for path in the_search(output).glob("images/*/[!.]*.png")}


def test_a_killed_search_goes_on_and_draws_nothing_twice(alone, tmp_path):
    """Killed twice, with no mercy; pictures that lay there are not written again."""
    command = [Path(sys.executable).parent / "sdprune", *search(tmp_path, *ONE)]
    wanted, chance = len(pictures(alone)), random.Random(0)
    for share in (0.1, 0.7):
        seen = pictures(tmp_path) if runs(tmp_path, "search-") else {}
        running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        while running.poll() is None:
            time.sleep(0.05 + chance.random() / 20)
            if runs(tmp_path, "search-") and len(pictures(tmp_path)) > share * wanted:
                break
        assert running.poll() is None
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        assert not (the_search(tmp_path) / "results.json").exists()
        assert seen.items() <= pictures(tmp_path).items()
    seen = pictures(tmp_path)
    done = process(search(tmp_path, *ONE))
    assert done.returncode == 0, done.stderr
    assert seen.items() <= pictures(tmp_path).items()
    assert verdicts(tmp_path) == verdicts(alone)
    assert (the_search(tmp_path) / "scores.csv").read_bytes() == (the_search(alone) / "scores.csv").read_bytes()
    images = [the_search(output) / "images" for output in (tmp_path, alone)]
    drawn = [{path.relative_to(place): path.read_bytes() for path in place.glob("*/*.png")} for place in images]
    assert drawn[0] == drawn[1]


def test_two_processes_come_to_the_same(alone, tmp_path):
    done = process(search(tmp_path, *ONE, "--trainer.devices=2"))
    assert done.returncode == 0, done.stderr
    assert verdicts(tmp_path) == verdicts(alone)
    one, two = scores_of(alone), scores_of(tmp_path)
    assert one.keys() == two.keys()
    assert all(two[key][: len(scores)] == scores for key, scores in one.items())
    assert done.stdout.count("With 95 % confidence") == len(found(alone)["claims"])


def test_a_budget_is_searched_by_its_totals(sdprune, tmp_path):
    """With statistics that are gathered for it, and the CLIP score, whose loss is relative."""
    levels = ["--model.levels={low: 0.05, high: 0.9, step: 0.4}", "--model.prune.text_encoder.criterion=Wanda"]
    steps = "--model.sampling.steps=4"  # in one step the dense model draws nothing that could be lost
    told = sdprune(*search(tmp_path, *CLIP_SCORE, "--model.budget.total=0", "--model.also={}", steps, *levels))
    assert told.code == 0, told.err
    results = found(tmp_path)
    assert {probe["path"] for probe in results["probes"]} <= {"budget", "certificate"}
    assert all(probe["total"] in (0.05, 0.45, 0.85) for probe in results["probes"])
    dense = scores_of(tmp_path)["dense", "scale"]
    assert results["cap"] == pytest.approx(10 * 0.02 * np.maximum(dense[:16], 0).mean())
    assert len(list((tmp_path / "statistics").glob("text_encoder-input_norm-*/facts.json"))) == 1
    assert "calibration of text_encoder" in told.out
    if results["answer"]:
        assert f"total: {results['answer']['total']}" in (the_search(tmp_path) / "config.yaml").read_text()


def test_a_budget_that_is_split_by_measurement_is_searched_by_its_totals(sdprune, tmp_path):
    """Errors are measured once for all totals, and each model has the zeros of its total."""
    levels = ["--model.levels={low: 0.1, high: 0.5, step: 0.2}", "--model.budget={total: 0, split: sensitivity}"]
    block = "{class_path: Sensitivity, init_args: {unit: block, levels: [0.5, 0.9], samples: 2, steps: 1}}"
    units = [f"--model.prune.{name}.allocation={block}" for name in ("text_encoder", "unet")]
    told = sdprune(*search(tmp_path, "--model.tolerance=1", "--model.also={}", *levels, *units))
    assert told.code == 0, told.err
    answer = found(tmp_path)["answer"]
    assert answer["total"] in (0.1, 0.3, 0.5)
    assert answer["sparsity"]["prunable"]["pruned_fraction"] == pytest.approx(answer["total"], abs=1e-6)
    assert len(list((tmp_path / "statistics").glob("*pruned_error*/facts.json"))) == 2


def test_a_path_that_is_given_is_searched_alone(sdprune, tmp_path):
    """What is found on it is certified on fresh prompts."""
    path = "--model.path=[{text_encoder: 0.01}, {text_encoder: 0.02, unet: 0.02}, {text_encoder: 0.9, unet: 0.9}]"
    told = sdprune(*search(tmp_path, path, "--model.also={}"))
    assert told.code == 0, told.err
    results = found(tmp_path)
    assert [probe["path"] for probe in results["probes"]] == ["path", "path", "certificate"]
    assert results["answer"]["sparsities"] == {"text_encoder": 0.02, "unet": 0.02}
    assert results["probes"][0]["alpha"] == 0.025
    lines = [line for line in told.out.splitlines() if line.startswith("test ")]
    assert [line.split(" images")[0] for line in lines] == [
        f"test {number}, {probe['path']}, {model}: {probe['n']}"
        for number, (probe, model) in enumerate(
            zip(
                results["probes"],
                ["text_encoder 2 %, unet 2 %", "text_encoder 90 %, unet 90 %", "text_encoder 2 %, unet 2 %"],
                strict=True,
            ),
            1,
        )
    ]
    assert "path: at most 48 images left" in lines[0]


def test_pictures_without_numbers_lose_all_that_can_be_lost(sdprune, tmp_path, monkeypatch):
    from sdprune.pipelines import Drawn, StableDiffusion

    genuine = StableDiffusion.generate

    def broken(self, *arguments, **options):
        images, finite = genuine(self, *arguments, **options)
        pruned = (self.components["unet"].conv_in.weight == 0).any() or any(
            (module.weight == 0).any() for module in self.components["unet"].modules() if hasattr(module, "weight")
        )
        return Drawn(images, [False] * len(finite) if pruned else finite)

    monkeypatch.setattr(StableDiffusion, "generate", broken)
    told = sdprune(*search(tmp_path, "--model.prune={unet: {}}", "--model.also={}"))
    assert told.code == 0, told.err
    results = found(tmp_path)
    assert results["answer"] is None
    assert [probe["verdict"] for probe in results["probes"]] == ["futile"] * 2
    assert [probe["loss"] for probe in results["probes"]] == [pytest.approx(1)] * 2
    assert "No pruned model could be certified." in told.out
    assert "unet: no level was certified; the lowest is unet 2 %. Give lower --model.levels" in " ".join(
        told.out.split()
    )
    assert not (the_search(tmp_path) / "config.yaml").exists()
    report = sdprune("report", tmp_path)
    assert (report.code, "No finished run below" in report.err) == (2, True)


BAD = {
    "tolerance 0": (["--model.tolerance=0"], ["--model.tolerance is 0", "no number of images shows"]),
    "tolerance in per cent": ([*CLIP_SCORE[:2], "--model.tolerance=2"], ["--model.tolerance is 2", "at most 1"]),
    "levels upside down": (["--model.levels={low: 0.5, high: 0.3}"], ["levels.low", "0.5, 0.3 and 0.39"]),
    "levels beyond 1": (["--model.levels.high=80"], ["levels.high is 80", "for 80 %, write 0.8"]),
    "a score of all images": (
        ["--model.score=FrechetInceptionDistance", "--model.score.extractor=ClipImageFeatures",
         "--model.score.extractor.model=miniature"],
        ["--model.score is FrechetInceptionDistance, which gives no number for single images", "CLIPScore"],
    ),
    "another number": (["--model.scored=dense_mze"], ["scored 'dense_mze'", "Did you mean 'dense_mse'"]),
    "a number of the whole run": ([*CLIP_SCORE, "--model.scored=clip_gap"], ["'clip_gap'", "clip_score"]),
    "a share of no distance": (["--model.absolute=false"], ["dense_mse is a distance", "--model.absolute=true"]),
    "nothing to search": (["--model.prune={}", "--model.also={}"], ["prune is {}", "nothing to search"]),
    "a sparsity": (["--model.prune.unet.sparsity=0.3"], ["--model.prune.unet.sparsity is 0.3", "--model.levels"]),
    "a pattern": (["--model.prune.unet.granularity=2:4"], ["granularity is 2:4", "nothing to search"]),
    "sparsities by layer": (
        ["--model.prune.unet.allocation=PerLayer", "--model.prune.unet.allocation.layers={'*': 0.3}"],
        ["allocation is PerLayer", "never dense"],
    ),
    "a component": (["--model.prune.unett.criterion=Magnitude"], ["'unett'", "Did you mean 'unet'"]),
    "another component beside": (["--model.also={vae: 0.3}"], ["'vae'", "--model.prune.vae={}", "--model.also={}."]),
    "a path that falls": (["--model.path=[{unet: 0.3}, {unet: 0.2}]"], ["path goes from unet 30 % to unet 20 %"]),
    "a path of nothing": (["--model.path=[{unet: 0}]"], ["path[0]", "above 0"]),
    "a path and a budget": (
        ["--model.path=[{unet: 0.3}]", "--model.budget.total=0.2"], ["path and budget exclude each other"]
    ),
    "too few captions": (
        ["--data.n=500"], ["--data.n=500 needs 1016 captions", "its source has 120", "at most 52"],
    ),
    "too few images": (["--data.n=32"], ["--data.n=32 is too small", "images without any loss take"]),
    "a part of the batches": (["--trainer.limit_predict_batches=2"], ["limit_predict_batches"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_anything_is_drawn(sdprune, tmp_path, case):
    options, words = BAD[case]
    score = DISTANCE if not any(one.startswith("--model.score=") for one in options) else []
    told = sdprune(*search(tmp_path, *score, "--model.tolerance=0.1", *options))
    assert told.code == 2, told.out + told.err
    assert told.err.startswith("sdprune: error: ")
    assert told.err.count("\n") == 1, told.err
    for word in words:
        assert word in told.err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(("verb", "config"), [("predict", "search"), ("fit", "search"), ("search", "predict")])
def test_verbs_name_the_one_that_is_meant(sdprune, tmp_path, verb, config):
    told = sdprune(verb, "--config", CONFIGS / f"{config}.yaml", f"--model.output={tmp_path}")
    assert told.code == 2
    assert f"use sdprune {config}." in told.err


def test_a_lost_picture_of_the_dense_model_is_drawn_by_it_again(alone, sdprune, tmp_path):
    """Where it is looked for while the pipeline is pruned."""
    import shutil

    shutil.copytree(alone, tmp_path / "runs")
    directory, also = the_search(tmp_path / "runs"), "unet-0.35"
    (directory / "results.json").unlink()
    table = directory / "scores.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if also not in line))
    name = sorted(path.name for path in (directory / "images" / also).iterdir())[0]
    for model in ("dense", also):
        (directory / "images" / model / name).unlink()
    told = sdprune(*search(tmp_path / "runs", *ONE))
    assert told.code == 0, told.err
    for model in ("dense", also):
        kept = the_search(alone) / "images" / model / name
        assert (directory / "images" / model / name).read_bytes() == kept.read_bytes()
    assert verdicts(tmp_path / "runs") == verdicts(alone)


def test_the_table_of_scores_that_is_damaged_is_told(alone, sdprune, tmp_path):
    import shutil

    shutil.copytree(alone, tmp_path / "runs")
    (the_search(tmp_path / "runs") / "results.json").unlink()
    table = the_search(tmp_path / "runs") / "scores.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:10], *lines[11:]]))
    told = sdprune(*search(tmp_path / "runs", *ONE))
    assert told.code == 2
    assert f"{table} is damaged" in told.err


def test_the_configuration_for_sd2_parses(sdprune):
    told = sdprune("search", "--config", "sd2/search", "--model.levels.step=0.05", "--print_config")
    assert (told.code, told.err) == (0, "")
    assert "step: 0.05" in told.out


def test_help_shows_what_can_be_searched(sdprune):
    told = sdprune("search", "--help")
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith("usage: sdprune search --config FILE [options]")
    for words in (
        "SearchModule: ", "--model.tolerance FLOAT  (default: 0.02)", "--model.levels.step FLOAT  (default: 0.025)",
        "--model.prune.COMPONENT.criterion CLASS", "--model.score CLASS", "from one to the next",
    ):  # fmt: skip
        assert words in told.out, words


def test_a_score_that_cannot_read_the_captions_says_so_before_anything_is_drawn(sdprune, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"dog number {number}\n" for number in range(200)))
    given = ["--model.score=ExaminerScore", "--data.source=TextFile", f"--data.source.path={path}"]
    told = sdprune(*search(tmp_path, *given))
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert "ExaminerScore cannot read the caption 'dog number " in told.err
