"""What narrowing buys on the miniature: parameters, images a second and CLIP score, kind by kind and all together.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_narrowing_speed.py

draws 256 captions in 20 steps for every row, and writes records and statistics below $SDPRUNE_BENCHMARK_RUNS, or a
temporary directory: some minutes a row on two cores. SDPRUNE_BENCHMARK_N=128 draws fewer. Otherwise one row is made of
an untrained miniature.

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
from sdprune.pruning.narrowing import NarrowSpec, narrow_shapes

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
N = int(os.environ.get("SDPRUNE_BENCHMARK_N", "256")) if FULL else 4
CONFIG = Path(__file__).parents[2] / "configs" / "mini" / "predict.yaml"
STEPS, ROUNDS, BATCH = (20, 9, 32) if FULL else (2, 2, 2)
SHARES = [
    *({kind: share} for kind in ("channels", "neurons", "heads") for share in (0.2, 0.4)),
    *({"channels": share, "neurons": share, "heads": share} for share in (0.2, 0.4)),
    {"channels": 0.4, "neurons": 0.4, "heads": 0.2},
    {"channels": 0.4, "neurons": 0.4},
]
ROWS = [(share, refit) for share in SHARES for refit in (True, False)] if FULL else [({"channels": 0.4}, True)]


@pytest.fixture(autouse=True)
def threads(one_thread):
    """Where time is taken, all cores work."""
    if FULL:
        torch.set_num_threads(os.cpu_count() or 1)


@pytest.fixture
def runs(request, tmp_path, monkeypatch):
    """Where records lie; what is not the full benchmark takes the untrained miniature."""
    if not FULL:
        request.getfixturevalue("miniature")
        return tmp_path
    monkeypatch.delenv("SDPRUNE_MINIATURE", raising=False)
    return Path(os.environ.get("SDPRUNE_BENCHMARK_RUNS") or tmp_path)


def quality(runs, share, refit):
    """The difference in CLIP score with its interval, and the share of the U-Net's parameters that is left."""
    before = set(runs.glob("*/results.json"))
    small = [] if FULL else ["--data.source.images=40", "--data.calibration.images=20"]
    calibration = ["--data.calibration_n=48", "--data.calibration_batch_size=16"]
    calibration = calibration if FULL else ["--data.calibration_n=2", "--data.calibration_batch_size=2"]
    words = [f"--data.n={N}", f"--model.sampling.steps={STEPS}", *small, *calibration]
    words += ["--model.prune={}", f"--model.output={runs}", f"--model.store={runs}/statistics", "--model.samples=[a]"]
    narrow = {"unet": {**share, "criterion": "Wanda", "refit": refit}}
    assert main(["predict", "--config", str(CONFIG), *words, f"--model.narrow={json.dumps(narrow)}"]) == 0
    found = [json.loads(path.read_text()) for path in runs.glob("*/results.json") if path not in before]
    (results,) = (one for one in found if "narrowing" in one)
    unet = results["narrowing"]["unet"]
    interval = [results["comparison"][f"clip_score_diff{end}"] for end in ("", "_low", "_high")]
    return interval, unet["parameters"] / unet["parameters_before"]


def speed(share):
    """Images a second over those of the dense model: it depends on shapes alone."""
    models = {}
    for name in ("dense", "narrow"):
        models[name] = StableDiffusion("miniature")
        models[name].load(torch.float32, torch.device("cpu"))
    narrow_shapes(models["narrow"].components["unet"], NarrowSpec(**share, criterion="Magnitude", refit=False))
    seconds = {"dense": [], "narrow": []}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(["a red star"] * BATCH, list(range(BATCH)), Sampling(steps=STEPS, guidance=2.5))
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(seconds["dense"], seconds["narrow"], strict=True))


def test_narrowing(runs):
    speeds = {}
    for share, refit in ROWS:
        key = json.dumps(share)
        speeds[key] = speeds.get(key) or speed(share)
        (difference, low, high), left = quality(runs, share, refit)
        words = " ".join(f"{kind} {one:.0%}" for kind, one in share.items())
        print(
            f"\n| {words} | {'refitted' if refit else 'plain'} | {left:.1%} | {speeds[key]:.2f} | {difference:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] |",
            flush=True,
        )
        assert left < 1
        assert speeds[key] > 0
        assert low <= difference <= high
