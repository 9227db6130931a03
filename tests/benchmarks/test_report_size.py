"""Time and size of a report of 107 runs with 200 images each, of the miniature's size and of Stable Diffusion 2's.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_report_size.py

runs at full size. Otherwise there are 8 runs with 24 images. Pictures are noise with the spectrum of photographs
(amplitude 1 / frequency), so that they compress no better; eight of them have many names.
"""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import spec, write
from test_report_damage import change

from sdprune.__main__ import main

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
N = 200 if FULL else 24
SECONDS, OPENS = 30, 3
PAGE, SINGLE = 5e6, 30e6  # bytes
METHODS = [(criterion, allocation) for criterion in ("Magnitude", "Wanda") for allocation in ("Uniform", "OWL")]


def cells():
    """As many as the study has, the dense one first."""
    text = [0.3, 0.4, 0.5, 0.55, 0.575, 0.6, 0.625, 0.65, 0.675, 0.7, 0.8]
    found = [{}, *({"text_encoder": spec(share, *method)} for method in METHODS for share in text)]
    found += [{"unet": spec(0.1 + 0.04 * number)} for number in range(14)]
    found += [{"text_encoder": spec(0.3 + 0.01 * i), "unet": spec(0.6 - 0.01 * i)} for i in range(48)]
    assert len(found) == 107
    return found if FULL else found[::15]


def photograph(side: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls as 1 / frequency, in colours that go together as those of photographs do."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequencies[0, 0] = 1
    noise = np.random.default_rng(seed).normal(size=(3, side, side))
    layers = np.fft.irfft2(np.fft.rfft2(noise) / frequencies, (side, side))
    mixed = np.einsum("ij,jhw->hwi", [[1, 0.3, 0.1], [1, 0, -0.2], [1, -0.3, 0.1]], layers)
    return Image.fromarray(np.clip(128 + 50 * mixed / mixed.std(), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=[64, 512])
def runs(request, tmp_path_factory):
    """(side of the pictures, directory of the runs)"""
    side, root = request.param, tmp_path_factory.mktemp("runs")
    pictures = [root / f"{number}.png" for number in range(8)]
    for number, path in enumerate(pictures):
        photograph(side, number).save(path)
    for number, prune in enumerate(cells()):
        share = sum(one["sparsity"] for one in prune.values())
        run = write(root, prune, 18 + 20 * share**4, 0.314 - 0.1 * share**4, n=N)
        change(run, "results.json", lambda results: results.update(samples=[f"prompt {place}" for place in range(4)]))
        shutil.rmtree(run / "samples")
        (run / "samples").mkdir()
        for folder, count in (("samples", 4), ("images", N)):
            for place in range(count):
                os.link(pictures[(number + place) % 8], run / folder / f"{place}.png")
    return side, root


def made(root: Path, out: Path, *options: str) -> float:
    """Make a report; returns its seconds of processor time, of which two cores need half or more."""
    before = time.process_time()
    assert main(["report", str(root), "--out", str(out), *options]) == 0
    return time.process_time() - before


def test_a_report_of_the_whole_study(runs, tmp_path, chromium, capsys):
    side, root = runs
    taken = made(root, tmp_path / "report")
    page = tmp_path / "report" / "report.html"
    opened = min(opening(chromium, page) for _ in range(3))
    alone = made(root, tmp_path / "alone", "--single-file")
    size, whole = (path.stat().st_size for path in (page, tmp_path / "alone" / "report.html"))
    with capsys.disabled():
        print(
            f"\n{len(cells())} runs of {N} images, {side} pixels: {taken:.1f} s of processor time, page "
            f"{size / 1e6:.2f} MB, opened in {opened:.1f} s; --single-file {alone:.1f} s, {whole / 1e6:.1f} MB"
        )
    assert max(taken, alone) <= SECONDS
    assert opened < OPENS
    assert size <= PAGE
    assert whole <= SINGLE


def opening(chromium, page: Path) -> float:
    """Seconds until the chart is drawn."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    tab, start = context.new_page(), time.monotonic()
    tab.goto(f"file://{page}")
    tab.wait_for_selector("#chart[data-drawn]")
    taken = time.monotonic() - start
    context.close()
    return taken
