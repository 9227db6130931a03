"""Standard errors, the jackknife and the paired bootstrap, against loops that leave out and draw the same images."""

import numpy as np
import pytest
import scipy.linalg
import torch
from scoring import PooledFeatures

from sdprune.errors import InputError
from sdprune.metrics import (
    FrechetInceptionDistance,
    FrechetTo,
    Statistics,
    feature_statistics,
    frechet_distance,
    mean,
    paired_bootstrap,
    standard_error,
)
from sdprune.metrics.paired import jackknife_interval


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + seed


def naive_bootstrap(a, b, statistic, resamples, seed, confidence):
    """One resample at a time; the same draws, because numpy fills a matrix row by row."""
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        index = rng.integers(0, len(a), size=len(a))
        draws.append(statistic(a[index]) - statistic(b[index]))
    tail = (1 - confidence) / 2
    return statistic(a) - statistic(b), np.quantile(draws, tail), np.quantile(draws, 1 - tail), np.std(draws, ddof=1)


def test_standard_error_by_hand():
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx((14 / 3 / 4) ** 0.5)
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        standard_error(torch.ones(1))


@pytest.mark.parametrize("statistic", [mean, lambda scores: scores.double().median().item()], ids=["mean", "median"])
def test_bootstrap_of_scores_is_the_naive_loop(statistic):
    a, b = rows(1, 37, 1)[0], rows(1, 37, 2)[0]
    found = paired_bootstrap(a, b, statistic, resamples=200, seed=5, confidence=0.9)
    expected = naive_bootstrap(a, b, statistic, 200, 5, 0.9)
    assert (found.estimate, found.low, found.high, found.se) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(60, 4), (20, 12), (12, 30), (8, 5)], ids=["n>>d", "n>d", "n<d", "mixed"])
def test_bootstrap_of_fid_is_the_naive_loop(n, d):
    reference = feature_statistics(rows(100, d, 3))

    def plain(features):
        own = feature_statistics(features)
        return frechet_distance(reference.mu, reference.sigma, own.mu, own.sigma)

    a, b = rows(n, d, 1), rows(n, d, 2)
    found = paired_bootstrap(a, b, FrechetTo(reference), resamples=40, seed=1)
    expected = naive_bootstrap(a, b, plain, 40, 1, 0.95)
    assert (found.estimate, found.low, found.high, found.se) == pytest.approx(expected, rel=1e-6)


def leave_one_out(rows: torch.Tensor, reference: Statistics) -> np.ndarray:
    """FID of all rows but one, for each one: Tr (R S R)^1/2 as a sum of singular values."""
    rows, mu, sigma = rows.double().numpy(), reference.mu.numpy(), reference.sigma.numpy()
    root = scipy.linalg.sqrtm(sigma).real
    values = []
    for i in range(len(rows)):
        rest = np.delete(rows, i, axis=0)
        around_mean = (rest - rest.mean(0)) / (len(rest) - 1) ** 0.5
        cross = np.linalg.svd(around_mean @ root, compute_uv=False).sum()
        values.append(((rest.mean(0) - mu) ** 2).sum() + np.trace(sigma) + (around_mean**2).sum() - 2 * cross)
    return np.array(values)


SIZES = pytest.mark.parametrize(
    ("n", "d"), [(60, 4), (20, 12), (13, 12), (12, 12), (12, 30), (3, 5)], ids=lambda value: str(value)
)


@SIZES
def test_distances_without_each_image_are_those_of_the_rest(n, d):
    reference = feature_statistics(rows(100, d, 3))
    expected = leave_one_out(rows(n, d, 1), reference)
    assert FrechetTo(reference).without_each(rows(n, d, 1)).numpy() == pytest.approx(expected, rel=1e-7)


@SIZES
def test_the_interval_of_fid_is_the_jackknife(n, d):
    reference, pruned, dense = feature_statistics(rows(100, d, 3)), rows(n, d, 1), rows(n, d, 2)
    score = FrechetInceptionDistance(PooledFeatures())
    key = score.columns[0].key
    values = leave_one_out(pruned, reference) - leave_one_out(dense, reference)
    se = ((n - 1) / n * ((values - values.mean()) ** 2).sum()) ** 0.5
    difference = FrechetTo(reference)(pruned) - FrechetTo(reference)(dense)
    expected = {
        "fid_diff": difference, "fid_diff_low": difference - 1.96 * se, "fid_diff_high": difference + 1.96 * se,
        "fid_diff_se": se,
    }  # fmt: skip
    assert score.compare({key: pruned}, {key: dense}, reference) == pytest.approx(expected, rel=1e-6)


def test_two_images_have_a_difference_and_no_interval():
    score, reference = FrechetInceptionDistance(PooledFeatures()), feature_statistics(rows(20, 6, 3))
    key = score.columns[0].key
    assert set(score.compare({key: rows(2, 6, 1)}, {key: rows(2, 6, 2)}, reference)) == {"fid_diff"}
    with pytest.raises(InputError, match="at least 3 images, got 2"):
        FrechetTo(reference).without_each(rows(2, 6, 1))


def test_images_that_are_all_alike_have_an_interval():
    """As of a model that draws black alone."""
    reference, black = feature_statistics(rows(20, 6, 3)), torch.ones(9, 6)
    assert FrechetTo(reference).without_each(black).numpy() == pytest.approx(leave_one_out(black, reference))


@pytest.mark.parametrize("n", [10, 60], ids=["n<d", "n>d"])
def test_the_jackknife_covers_the_expected_difference(n):
    d, generator = 20, torch.Generator().manual_seed(0)
    distance = FrechetTo(Statistics(torch.zeros(d).double(), torch.eye(d).double()))
    found = []
    for _ in range(300):
        dense = torch.randn(n, d, generator=generator)
        pruned = dense * 1.2 + 0.1 * torch.randn(n, d, generator=generator)
        without = distance.without_each(pruned) - distance.without_each(dense)
        found.append(jackknife_interval(distance(pruned) - distance(dense), without))
    truth = np.mean([one.estimate for one in found])
    assert 0.91 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99
    assert 0.9 <= np.mean([one.se for one in found]) / np.std([one.estimate for one in found]) <= 1.3


def test_equal_models_differ_by_exactly_nothing():
    reference = Statistics(torch.zeros(4).double(), torch.eye(4).double())
    features = rows(30, 4, 1)
    found = paired_bootstrap(features, features.clone(), FrechetTo(reference), resamples=20)
    assert (found.estimate, found.low, found.high, found.se) == (0, 0, 0, 0)


def test_pairing_narrows_the_interval_and_it_covers_what_it_should():
    generator, covered, ratio = torch.Generator().manual_seed(0), 0, []
    for trial in range(200):
        noise = torch.randn(80, generator=generator)
        a, b = noise + 0.1 * torch.randn(80, generator=generator) + 0.2, noise
        found = paired_bootstrap(a, b, mean, resamples=200, seed=trial)
        covered += found.low <= 0.2 <= found.high
        ratio.append(found.se / np.hypot(standard_error(a), standard_error(b)))
    assert 0.88 <= covered / 200 <= 0.99
    assert np.mean(ratio) < 0.15


def test_a_centered_interval_is_the_plain_one_moved_onto_the_difference():
    reference, a, b = feature_statistics(rows(100, 12, 3)), rows(20, 12, 1), rows(20, 12, 2)
    plain = paired_bootstrap(a, b, FrechetTo(reference), resamples=60)
    moved = paired_bootstrap(a, b, FrechetTo(reference), resamples=60, centered=True)
    assert (moved.estimate, moved.se) == (plain.estimate, pytest.approx(plain.se))
    assert moved.high - moved.low == pytest.approx(plain.high - plain.low)
    assert moved.low < moved.estimate < moved.high
    assert abs(moved.low - plain.low) > 0.1 * plain.se


def test_the_fid_interval_covers_the_expected_difference():
    """Where n is not far above d the plain interval misses it most of the time."""
    d, n, statistic = 24, 60, FrechetTo(Statistics(torch.zeros(24).double(), torch.eye(24).double()))
    generator = torch.Generator().manual_seed(0)

    def models():
        dense = torch.randn(n, d, generator=generator)
        return dense * 1.2 + 0.1 * torch.randn(n, d, generator=generator), dense

    expected = np.mean([statistic(a) - statistic(b) for a, b in (models() for _ in range(300))])
    covered = {True: 0, False: 0}
    for seed in range(25):
        pair = models()
        for centered in covered:
            found = paired_bootstrap(*pair, statistic, 80, seed, centered=centered)
            covered[centered] += bool(found.low <= expected <= found.high)
    assert covered[True] >= 22
    assert covered[False] <= 15


def test_an_interval_names_its_numbers():
    found = paired_bootstrap(torch.tensor([1.0, 3.0]), torch.zeros(2), mean, resamples=10)
    assert found.as_dict("x") == {"x": 2.0, "x_low": found.low, "x_high": found.high, "x_se": found.se}


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (5, 4, {}, "got 5 and 4"),
        (1, 1, {}, "got 1 and 1"),
        (5, 5, {"resamples": 1}, "at least 2 resamples, got 1"),
        (5, 5, {"confidence": 1.0}, "between 0 and 1, got 1.0"),
    ],
)
def test_bad_input_is_named(a, b, options, message):
    with pytest.raises(InputError, match=message):
        paired_bootstrap(torch.zeros(a), torch.zeros(b), mean, **options)
