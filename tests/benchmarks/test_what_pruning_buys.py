"""What pruning buys on the miniature: disk, memory, time and quality of every kind of smaller model, one table.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_what_pruning_buys.py

draws 256 captions in 20 steps for every row, all in fp32: some ten minutes on two cores. Models, records and statistics
lie below $SDPRUNE_BENCHMARK_RUNS, or a temporary directory. Otherwise an untrained miniature makes four pictures a row.

Disk is the size of the directory, memory that of all parameters and buffers, speed the median of images a second over
those of the dense model, drawn in turn, all cores working.
"""

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from command_lines import CONFIGS

import sdprune
from sdprune.__main__ import main

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
N, STEPS, ROUNDS, BATCH = (256, 20, 9, 32) if FULL else (4, 2, 2, 2)
SMALL = [] if FULL else ["--data.calibration_n=2", "--data.calibration_batch_size=2", "--data.source.images=40"]
NARROW = "--model.narrow={unet: {flops: 0.35}}" if FULL else "--model.narrow={unet: {channels: 0.4}}"

pytestmark = pytest.mark.usefixtures("threads")


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def made(runs: Path) -> dict[str, Path]:
    """The directories to compare."""
    place = {
        name: runs / "models" / name
        for name in ("dense", "pruned", "packed", "narrowed", "narrowed and packed", "lossless")
    }
    where = [f"--model.output={runs}", f"--model.store={runs}/statistics", f"--model.sampling.steps={STEPS}", *SMALL]
    fit = ["fit", "--config", CONFIGS / "prune.yaml", *where]
    if not place["dense"].exists():
        run(*fit, "--model.prune={}", f"--model.directory={place['dense']}")
        run(*fit, f"--model.directory={place['pruned']}")
        run("pack", place["pruned"], "--out", place["packed"])
        run(*fit, "--model.prune={}", NARROW, f"--model.directory={place['narrowed']}")
        both = runs / "models" / "narrowed and pruned"
        run(*fit, NARROW, f"--model.directory={both}")
        run("pack", both, "--out", place["narrowed and packed"])
        run("lossless", place["dense"], "--out", place["lossless"])
    return place


def quality(runs: Path, name: str, directory: Path) -> str:
    """The difference in CLIP score to the dense model, with its 95 % interval."""
    output = runs / name.replace(" ", "-")
    words = [
        f"--data.n={N}",
        f"--model.sampling.steps={STEPS}",
        *SMALL[2:],
        "--model.samples=[a]",
        f"--model.output={output}",
    ]
    run(
        "predict", "--config", CONFIGS / "predict.yaml", *words, "--model.prune={}",
        f"--model.pipeline.model={directory}", "--model.baseline=miniature",
    )  # fmt: skip
    found = [json.loads(path.read_text())["comparison"] for path in output.glob("*/results.json")]
    (one,) = (comparison for comparison in found if comparison)
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(one[f"clip_score_diff{end}"] for end in ("", "_low", "_high")))


def speeds(places: dict[str, Path]) -> dict[str, float]:
    """Images a second over those of the dense model."""
    pipes = {name: sdprune.load(directory) for name, directory in places.items()}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(ROUNDS + 1):
        for name, pipe in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            start = time.perf_counter()
            pipe(["a red star"] * BATCH, num_inference_steps=STEPS, guidance_scale=2.5)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(seconds["dense"], own, strict=True))
        for name, own in seconds.items()
    }


def memory(directory: Path) -> int:
    """Bytes of all parameters and buffers."""
    modules = [one for one in sdprune.load(directory).components.values() if isinstance(one, torch.nn.Module)]
    return sum(t.nbytes for one in modules for t in (*one.parameters(), *one.buffers()))


def test_what_pruning_buys(runs):
    places = made(runs)
    disk = {
        name: sum(one.stat().st_size for one in place.rglob("*") if one.is_file()) for name, place in places.items()
    }
    faster = speeds(places)
    for name, place in places.items():
        difference, ratio = quality(runs, name, place), disk[name] / disk["dense"]
        print(
            f"\n| {name} | {disk[name] / 1e6:.1f} MB ({ratio:.2f}) | {memory(place) / 1e6:.1f} MB | "
            f"{faster[name]:.2f} | {difference} |",
            flush=True,
        )
    assert disk["packed"] < disk["pruned"]
    assert disk["narrowed"] < disk["dense"]
    assert memory(places["pruned"]) == memory(places["dense"]) > memory(places["narrowed"])
