"""What narrowing buys on the miniature: parameters, images a second and CLIP score, by measurement, kind by kind and
all kinds together. Every model is saved and loaded again.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_narrowing_speed.py

draws 256 captions in 20 steps for every row, and writes records and statistics below $SDPRUNE_BENCHMARK_RUNS, or a
temporary directory: two minutes a row on two cores. `-k "plain and not flops"` chooses rows, SDPRUNE_BENCHMARK_N=128
draws fewer. What was drawn for a row is kept: a second run in the same directory measures speed alone, so that only
that needs idle cores. Without SDPRUNE_BENCHMARK one row is made of an untrained miniature.

Speed is the median of images a second over those of the dense model, drawn in turn by both, all cores working.
"""

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from sdprune.__main__ import main
from sdprune.pipelines import Sampling, StableDiffusion

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
N = int(os.environ.get("SDPRUNE_BENCHMARK_N", "256")) if FULL else 4
CONFIGS = Path(__file__).parents[2] / "configs" / "mini"
STEPS, ROUNDS, BATCH = (20, 5, 16) if FULL else (2, 2, 2)
SHARES = [
    *({"flops": flops} for flops in (0.3, 0.35, 0.4, 0.45, 0.5)),
    *({kind: share} for kind in ("channels", "neurons", "heads", "layers") for share in (0.2, 0.4)),
    *({"channels": share, "neurons": share, "heads": share} for share in (0.2, 0.4)),
    {"channels": 0.4, "neurons": 0.4, "heads": 0.2},
]
ROWS = (
    [(share, refit) for share in SHARES for refit in ((True, False) if "layers" not in share else (True,))]
    if FULL
    else [({"flops": 0.05}, True)]
)

pytestmark = pytest.mark.usefixtures("threads")


def narrowed(runs, share, refit):
    """The directory of the narrowed model, and the share of the U-Net's parameters that is left."""
    calibration = ["--data.calibration_n=48", "--data.calibration_batch_size=16"]
    calibration = calibration if FULL else ["--data.calibration_n=2", "--data.calibration_batch_size=2"]
    directory = runs / "-".join(["narrowed", *(f"{kind}{one}" for kind, one in share.items()), f"refit{refit}"])
    words = [
        *small(calibration),
        "--model.prune={}",
        f"--model.store={runs}/statistics",
        f"--model.directory={directory}",
    ]
    choice = {} if FULL else {"criterion": "Wanda", "include": ["mid_block*"]}
    narrow = json.dumps({"unet": {**share, "refit": refit, **choice}})
    assert main(["fit", "--config", str(CONFIGS / "prune.yaml"), *words, f"--model.narrow={narrow}"]) == 0
    unet = json.loads((directory / "pruning_report.json").read_text())["narrowing"]["unet"]
    return directory, unet["parameters"] / unet["parameters_before"]


def quality(runs, directory):
    """The difference in CLIP score with its interval; kept beside the model."""
    kept = directory.with_name(f"{directory.name}-n{N}.json")
    if kept.exists():
        return json.loads(kept.read_text())
    before = set(runs.glob("*/results.json"))
    words = [*small([]), f"--data.n={N}", "--model.prune={}", f"--model.output={runs}", "--model.samples=[a]"]
    words += [f"--model.pipeline.model={directory}", "--model.baseline=miniature"]
    assert main(["predict", "--config", str(CONFIGS / "predict.yaml"), *words]) == 0
    made = [json.loads(path.read_text()) for path in runs.glob("*/results.json") if path not in before]
    (results,) = (one for one in made if one["comparison"])
    found = [results["comparison"][f"clip_score_diff{end}"] for end in ("", "_low", "_high")]
    kept.write_text(json.dumps(found))
    return found


def small(words):
    """Options of both commands, with a smaller world where little is measured."""
    world = [] if FULL else ["--data.source.images=40"]
    return [*words, *world, f"--model.sampling.steps={STEPS}", "--trainer.accelerator=cpu"]


def speed(directory):
    """Images a second over those of the dense model: the median and the quartiles of rounds."""
    models = {name: StableDiffusion(str(model)) for name, model in (("dense", "miniature"), ("narrow", directory))}
    seconds = {name: [] for name in models}
    for model in models.values():
        model.load(torch.float32, torch.device("cpu"))
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(["a red star"] * BATCH, list(range(BATCH)), Sampling(steps=STEPS, guidance=2.5))
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(a / b for a, b in zip(seconds["dense"], seconds["narrow"], strict=True))
    return median, low, high


def name(share, refit):
    """Of a row."""
    return "-".join([*(f"{kind}-{one:.0%}" for kind, one in share.items()), "refitted" if refit else "plain"])


@pytest.mark.parametrize(("share", "refit"), ROWS, ids=[name(*row) for row in ROWS])
def test_narrowing(runs, share, refit):
    directory, left = narrowed(runs, share, refit)
    (difference, low, high), (median, slow, fast) = quality(runs, directory), speed(directory)
    words = " ".join(f"{kind} {one:.0%}" for kind, one in share.items())
    print(
        f"\n| {words} | {'refitted' if refit else 'plain'} | {left:.1%} | {median:.2f} ({slow:.2f} to {fast:.2f}) "
        f"| {difference:+.4f} [{low:+.4f}, {high:+.4f}] |",
        flush=True,
    )
    assert left < 1
    assert median > 0
    assert low <= difference <= high
