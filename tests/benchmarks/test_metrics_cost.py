"""Time and memory of every score of configs/sd2/metrics.yaml and of its comparison to the dense model.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_metrics_cost.py

measures one model on two threads, at 10,000 images with 2,048 features of Inception and 512 to 1,024 of CLIP, all of
them random and correlated; no network runs. Otherwise every number is smaller, and what comes out is looked at.

SDPRUNE_IMAGES and SDPRUNE_SHRINK choose other sizes.
"""

import math
import os
import resource
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import sdprune.metrics
from sdprune.metrics import ClipImageFeatures, FeatureExtractor, MeasuredRows, Statistics, feature_statistics

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
N = int(os.environ.get("SDPRUNE_IMAGES", 10_000 if FULL else 150))
SHRINK = int(os.environ.get("SDPRUNE_SHRINK", 1 if FULL else 64))
WIDTHS = {
    "InceptionFeatures": 2048,
    "openai/clip-vit-large-patch14-336": 768,
    "openai/clip-vit-base-patch32": 512,
    "yuvalkirstain/PickScore_v1": 1024,
}
CONFIG = Path(__file__).parents[2] / "configs" / "sd2" / "metrics.yaml"


class NoNetwork(FeatureExtractor):
    """Has a name and a width."""

    def __init__(self, name, width):
        self.title, self.width = name, width

    name = property(lambda self: self.title)
    num_features = property(lambda self: self.width)

    def load(self, device):
        raise AssertionError("no network is wanted")

    preprocess = extract = load

    def describe(self):
        return {"class": "NoNetwork", "name": self.title}


def metrics():
    """Those of the configuration, and the width of each one's features."""
    for entry in yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["metrics"]:
        options = dict(entry["init_args"])
        network = options.get("extractor", {"class_path": "CLIP", "init_args": options})
        name = network["init_args"].get("model", network["class_path"])
        if "extractor" in options and entry["class_path"] != "MaximumMeanDiscrepancy":
            protocol = network["init_args"].get("protocol", name)
            options["extractor"] = NoNetwork(protocol, WIDTHS[name] // SHRINK)
        elif "extractor" in options:  # is CMMD with its own network alone
            options["extractor"] = ClipImageFeatures(**network["init_args"])
            options["extractor"].__class__ = type(
                "Clip", (ClipImageFeatures,), {"num_features": WIDTHS[name] // SHRINK}
            )
        yield getattr(sdprune.metrics, entry["class_path"])(**options), WIDTHS[name] // SHRINK


def features(kind, network, d):
    """Features [N, d], positive and correlated as Inception's are; dense and pruned ones of an image are alike."""
    generator = torch.Generator().manual_seed(zlib.crc32(network.encode()))
    noise = torch.randn(N, d, generator=generator)
    spread = torch.randn(d, d, generator=generator) * (torch.arange(d) + 1.0).pow(-0.5)[:, None]
    generator.manual_seed(zlib.crc32(kind.encode()))
    shared, alone = {"dense": (1, 0), "pruned": (0.97, 0.24), "real": (0.6, 0.8)}[kind]
    return ((shared * noise + alone * torch.randn(N, d, generator=generator)) @ spread).relu_()


def rows(score, kind, d):
    """What the score reads of N images."""
    found = {"dense.mse": torch.ones(N).double(), "dense.ssim": torch.rand(N).double(), "prompts": torch.arange(N)}
    for column in score.columns:
        if column.key not in found:
            found[column.key] = features("real" if column.key.endswith(".texts") else kind, score.extractor.name, d)
    return MeasuredRows({column.key: found[column.key] for column in score.columns})


@pytest.fixture
def threads(one_thread):
    if FULL:
        torch.set_num_threads(2)
    yield torch.get_num_threads()
    torch.set_num_threads(1)


def test_every_score_of_one_model(threads):
    total, cpu, peaks, found = 0.0, 0.0, {}, {}
    for score, d in metrics():
        reference = None
        if score.needs_reference:
            real = features("real", score.extractor.name, d)
            moments = feature_statistics(real)
            reference = Statistics(moments.mu, moments.sigma, N, None, real)
        own, dense, scores = rows(score, "pruned", d), rows(score, "dense", d), {}
        seconds, used = [], time.process_time()
        for step in (partial(score.compute, own, reference), partial(score.compare, own, dense, reference)):
            start = time.perf_counter()
            scores |= step()
            seconds.append(time.perf_counter() - start)
        total, cpu = total + sum(seconds), cpu + time.process_time() - used
        peaks[score.name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        name = score.name or type(score).__name__
        line = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if not key.endswith(("_low", "_high")))
        print(f"\n{name}, {d} features: {seconds[0]:.1f} s, compared in {seconds[1]:.1f} s; {line}", flush=True)
        found |= scores
    print(f"{N} images: {total:.0f} s ({cpu:.0f} s of CPU) on {threads} threads, at most {max(peaks.values()):.1f} GiB")
    assert all(math.isfinite(value) for value in found.values())
    intervals = ("fid", "fid_study", "fid_pytorch", "kid", "cmmd", "precision", "clip_score", "pick_score")
    assert {f"{name}_diff_low" for name in intervals} <= set(found)
    if FULL and N == 10_000 and SHRINK == 1:
        assert max(peaks.values()) < 4
        assert cpu < 2 * 180  # three minutes on two cores; CPU time, since the machine may have other work
