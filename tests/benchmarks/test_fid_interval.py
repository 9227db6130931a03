"""How often the 95 % interval of a FID difference holds the expected difference, in simulated models.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_fid_interval.py

repeats it for 64 and 512 features with n from half as many images as features to twenty times as many, an hour on one
core. Otherwise it is 16 features, and coverage and width are checked.

Prompts are vectors; a real, a dense and a pruned image are each partly their prompt and partly noise, with covariances
that fall like 1 / k and lengths that vary by a factor of six. Dense and pruned share nearly all of their noise.
"""

import os

import numpy as np
import pytest
import torch

from sdprune.metrics import FrechetTo, feature_statistics, paired_bootstrap
from sdprune.metrics.paired import jackknife_interval

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
# features: (experiments, those with a bootstrap too)
EXPERIMENTS = {64: (300, 60), 512: (60, 6)} if FULL else {16: (300, 15)}
RATIOS = (0.5, 1, 4, 20) if FULL else (0.5, 1, 8)
RESAMPLES = 100


class World:
    """Draws prompts with their features: real, dense, pruned, [n, d] each."""

    def __init__(self, d, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        axes = torch.linalg.qr(torch.randn(d, d, generator=self.generator))[0]
        self.map = axes / (torch.arange(d) + 1).sqrt()

    def lengths(self, n):
        return 0.3 + 1.5 * torch.rand(n, 1, generator=self.generator)

    def noise(self, n):
        return torch.randn(n, len(self.map), generator=self.generator)

    def draw(self, n):
        prompts = 0.6 * self.noise(n)
        real, dense = (prompts + 0.8 * self.noise(n) for _ in range(2))
        pruned = 0.97 * dense + 0.24 * self.noise(n)
        lengths, shift = self.lengths(n), self.map[:, 0]
        features = (real * self.lengths(n), 0.9 * dense * lengths, 0.95 * pruned * lengths)
        real, dense, pruned = (rows @ self.map.T for rows in features)
        return real, dense + 0.2 * shift, pruned + 0.3 * shift


def jackknife(distance, dense, pruned):
    without = distance.without_each(pruned) - distance.without_each(dense)
    return jackknife_interval(distance(pruned) - distance(dense), without)


def coverage(intervals, estimates):
    """The share that hold the mean of all estimates, and the mean standard error over the estimates' deviation."""
    truth = np.mean(estimates)
    held = np.mean([one.low <= truth <= one.high for one in intervals])
    return held, np.mean([one.se for one in intervals]) / np.std(estimates, ddof=1)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("d", EXPERIMENTS)
def test_coverage(d, ratio):
    n, world, (experiments, bootstraps) = int(ratio * d), World(d), EXPERIMENTS[d]
    fixed = FrechetTo(feature_statistics(world.draw(20 * d)[0]))
    found = {"jackknife": [], "bootstrap": [], "other real images": []}
    for number in range(experiments):
        real, dense, pruned = world.draw(n)
        found["jackknife"].append(jackknife(fixed, dense, pruned))
        if number < bootstraps:
            interval = paired_bootstrap(pruned, dense, fixed, RESAMPLES, number, centered=True)
            found["bootstrap"].append(interval)
        found["other real images"].append(jackknife(FrechetTo(feature_statistics(real)), dense, pruned))
    estimates = {name: [one.estimate for one in intervals] for name, intervals in found.items()}
    estimates["bootstrap"] = estimates["jackknife"]  # of the same statistic, and more of them
    told = {name: coverage(found[name], estimates[name]) for name in found}
    line = "; ".join(f"{name} {held:.1%}, se / sd {width:.2f}" for name, (held, width) in told.items())
    print(f"\nd {d}, n {n}, {experiments} experiments ({bootstraps} of the bootstrap): {line}", flush=True)
    held, width = told["jackknife"]
    assert held > (0.85 if FULL else 0.91)  # of 60 experiments
    assert (0.75 if FULL else 0.9) < width < 1.35
