"""How often `sdprune search` is wrong, how close it comes, and how many images it takes.

    SDPRUNE_RUNS=runs pytest -n 0 -s tests/benchmarks/test_search_cost.py -k stored

simulates 100 searches of up to 768 images a test by the scores of a grid of finished runs below `runs`, prompts drawn
anew with replacement: for each component and method whose runs prune it alone at eight sparsities or more. Levels are
2.5 % apart; between two of the grid a picture has the score at one or the other, in proportion. Such a grid is

    sdprune sweep mini_methods_unet mini_methods_text_encoder

    SDPRUNE_BENCHMARK=1 SDPRUNE_BENCHMARK_RUNS=searches pytest -n 0 -s tests/benchmarks/test_search_cost.py -k ten

runs ten real searches of the miniature, each on other prompts and noise, below `searches` or a temporary directory; and

    SDPRUNE_RUNS=searches pytest -n 0 -s tests/benchmarks/test_search_cost.py -k pooled

simulates 400 searches by their scores: the losses of all of them at a level, drawn with replacement.
"""

import itertools
import json
import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_lines import CONFIGS
from searching import simulate

from sdprune.search.certificate import FIRST, Tolerance

SEARCHES, N_MAX, STEP = 100, 768, 0.025
LEVELS = 8  # a grid has so many at least
POPULATION = 4000


def grids(directory):
    """(name, scores by sparsity with 0 for dense) of every component and method."""
    from sdprune.study.group import Study
    from sdprune.study.records import read

    for _, runs in read([directory]).runs.groupby("group"):
        study = Study(runs)
        for kind in ("text", "image"):
            for method, alone in study.alone(kind).items():
                alone = alone.drop_duplicates(f"{kind}_sparsity").sort_values(f"{kind}_sparsity")
                levels = [float(level) for level in alone[f"{kind}_sparsity"] if level]
                if study.dense is None or len(levels) < LEVELS:
                    continue
                scores = dict(zip(alone[f"{kind}_sparsity"], alone["clip_scores"], strict=True))
                yield f"{kind}, {method}", {**scores, 0.0: study.dense["clip_scores"]}


def between(scores):
    """Scores by sparsity at every STEP up to the sparsest, from those of a coarser grid."""
    known, chance = sorted(scores), np.random.default_rng(0).random(len(scores[0.0]))
    found = {0.0: scores[0.0]}
    for level in np.arange(STEP, known[-1] + STEP / 2, STEP).round(3).tolist():
        more = next(one for one in known if one >= level)
        less = max(one for one in known if one < level)
        found[level] = np.where(chance < (level - less) / (more - less), scores[more], scores[less])
    return found


@pytest.mark.skipif("SDPRUNE_RUNS" not in os.environ, reason="set SDPRUNE_RUNS to a directory of runs")
def test_stored_scores_of_a_grid():
    found = 0
    for (name, scores), value in itertools.product(grids(os.environ["SDPRUNE_RUNS"]), (0.01, 0.02, 0.05)):
        found += 1
        measure(name, between(scores), value, SEARCHES)
    assert found, "no grid of eight sparsities of one component alone, with its dense run"


def measure(name, scores, value, searches):
    """Print how searches by scores of known levels come out; they may be wrong in 5 %, at an eighth of the images."""
    tolerance, dense = Tolerance(value), scores[0.0]
    levels = [level for level in scores if level]
    cap = tolerance.cap(dense)
    losses = {level: tolerance.losses(dense, scores[level], cap)[0].mean() for level in levels}
    beyond = [level for level in levels if losses[level] > value * dense.mean()]
    truth = max((level for level in levels if level < min(beyond, default=1)), default=0.0)
    steps, false, images, answers = Counter(), 0, [], []
    for search in simulate(
        tolerance, [name], levels, lambda model: scores[model.sparsities.get(name, 0.0)],
        len(dense), searches, n_max=N_MAX, chunk=8,
    ):  # fmt: skip
        answers.append(search.thresholds[name].sparsities.get(name, 0.0))
        false += losses.get(answers[-1], 0.0) > value * dense.mean()
        steps[sum(answers[-1] < one <= truth for one in levels)] += 1
        images.append(search.images())
    pruned, all_dense = (np.mean([one[kind] for one in images]) for kind in ("pruned", "dense"))
    share = (pruned + all_dense) / images[0]["grid"]
    near = (np.abs(np.array(answers) - np.median(answers)) < STEP * 1.01).mean()
    print(
        f"\n{name}, tolerance {value:g}: truth {truth:g}; wrong {false / searches:.1%}; steps below "
        f"{dict(sorted(steps.items()))}; within a step of the median {near:.0%}; {pruned:.0f} pruned and "
        f"{all_dense:.0f} dense images, {share:.1%} of the grid",
        flush=True,
    )
    assert false <= 0.05 * searches
    assert share <= 1 / 8


def pooled(directory):
    """(name, scores by sparsity with 0 for dense) of components that finished searches tested alone: for each level a
    sample of the losses of all searches, taken from dense scores that are a sample too."""
    losses, dense = defaultdict(lambda: defaultdict(list)), []
    for path in sorted(Path(directory).rglob("search-*/scores.csv")):
        table = pd.read_csv(path).pivot(index="position", columns=["prompts", "model"], values="score")["search"]
        dense += table["dense"].dropna().tolist()
        for model in table.columns.drop("dense"):
            name, _, level = model.rpartition("-")
            if "-" not in name:
                losses[name][float(level)] += (table["dense"] - table[model]).dropna().tolist()
    chance = np.random.default_rng(0)
    scores = chance.choice(dense, POPULATION)
    for name, by in losses.items():
        yield name, {0.0: scores, **{level: scores - chance.choice(by[level], POPULATION) for level in sorted(by)}}


@pytest.mark.skipif("SDPRUNE_RUNS" not in os.environ, reason="set SDPRUNE_RUNS to a directory of searches")
def test_pooled_scores_of_searches():
    worlds = list(pooled(os.environ["SDPRUNE_RUNS"]))
    assert worlds, "no finished searches"
    for name, scores in worlds:
        measure(name, between(scores), 0.02, 4 * SEARCHES)


@pytest.mark.skipif(os.environ.get("SDPRUNE_BENCHMARK") != "1", reason="ten searches take an hour and a half")
def test_ten_real_searches(runs):
    """With other prompts, noise and seeds; at least nine of ten agree within a step of each component's median."""
    from sdprune.__main__ import main

    answers, thresholds = [], []
    for seed in range(10):
        started, output = time.monotonic(), runs / str(seed)
        words = [f"--data.seed={seed}", f"--model.seed={seed}", f"--model.output={output}"]
        assert main(["search", "--config", str(CONFIGS / "search.yaml"), *words]) == 0
        (path,) = output.glob("search-*/results.json")
        found = json.loads(path.read_text())["search"]
        answers.append(found["answer"] and found["answer"]["sparsities"])
        thresholds.append({name: (one or {}).get(name, 0.0) for name, one in found["thresholds"].items()})
        print(
            f"\nseed {seed}: {answers[-1]}, alone {thresholds[-1]}, also {found['also']['verdict']}, "
            f"{found['images']}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    for name in thresholds[0]:
        values = np.array([one[name] for one in thresholds])
        assert (np.abs(values - np.median(values)) < 0.0251).sum() >= 9, (name, values)


def test_the_least_that_certifies():
    """Images that lose nothing are certified within a fifth of the largest number, at any depth of the usual tree."""
    from sdprune.search.certificate import ALPHA, fewest

    assert FIRST < fewest(ALPHA) < fewest(ALPHA / 5) < 256 / 4
