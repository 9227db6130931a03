"""The certificate of `sdprune search`: formulas against nested loops, claims against simulated truths."""

import math
from fractions import Fraction

import numpy as np
import pytest

from sdprune.errors import InputError
from sdprune.study.search.certificate import ALPHA, Bisection, Tolerance, decide, share_bound, upper_bound, wealth


def wealth_by_fractions(excess, cap):
    """The formula as it is written down, exactly."""
    found, wealth, w = [], Fraction(1), Fraction(cap)
    for i in range(len(excess)):
        if i == 0:
            bet = Fraction(3, 10) / w
        else:
            total = squares = Fraction(0)
            for earlier in excess[:i]:
                total += Fraction(earlier)
                squares += Fraction(earlier) ** 2
            mu = total / (i + 4)
            v = (4 * (Fraction(3, 20) * w) ** 2 + squares) / (i + 4) - mu**2
            bet = min(max(-mu / (v + mu**2), Fraction(0)), Fraction(19, 20) / w)
        wealth *= 1 - bet * Fraction(excess[i])
        found.append(wealth)
    return [float(one) for one in found]


@pytest.mark.parametrize("shift", [-0.15, -0.02, 0.1])
def test_the_wealth_is_the_formula(shift):
    x = np.clip(np.random.default_rng(0).normal(shift, 0.1, 24), -0.2, 0.2).tolist()
    exact = wealth_by_fractions(x, 0.2)
    np.testing.assert_allclose(list(wealth(x, 0.2)), exact, rtol=1e-12)
    several = np.array([x, [-one for one in x]])
    np.testing.assert_allclose([one[0] for one in wealth(several.T, 0.2)], exact, rtol=1e-12)


def test_no_look_before_the_first_and_none_between():
    """Ten losses of nothing would do by the tenth image, were there looks."""
    x = np.full(64, -0.9)
    assert list(wealth(x, 1.0))[10] > 1 / ALPHA
    assert decide(x[:15], 1.0, ALPHA, 64) is None
    assert decide(x, 1.0, ALPHA, 64)[:2] == ("certified", 16)
    late = np.concatenate([np.full(16, 0.02), np.full(48, -0.9)])
    reached = int(np.argmax(np.array(list(wealth(late, 1.0))) >= 1 / ALPHA)) + 1
    assert decide(late, 1.0, ALPHA, 64).n == math.ceil(reached / 8) * 8


def test_what_comes_later_changes_no_decision():
    chance = np.random.default_rng(1)
    for mean in (-0.08, -0.02, 0.05):
        x = np.clip(chance.normal(mean, 0.2, 128), -0.5, 0.5)
        whole = decide(x, 0.5, 0.01, 128)
        assert decide(x[: whole.n], 0.5, 0.01, 128) == whole
        assert all(decide(x[:n], 0.5, 0.01, 128) is None for n in range(whole.n))


def test_futility_is_the_formula():
    chance = np.random.default_rng(2)
    for mean in (0.0, -0.01, 0.02):
        x = chance.normal(mean, 0.05, 256)
        found = decide(x, 0.5, 0.01, 256)

        def hopeless(n, x=x):
            mean = sum(x[:n]) / n
            sd = math.sqrt(sum((one - mean) ** 2 for one in x[:n]) / (n - 1))
            return mean - sd / math.sqrt(n) > -sd * math.sqrt(2 * math.log(100) / 256)

        first = next((n for n in range(32, 257, 8) if hopeless(n)), 257)
        assert found.verdict == "certified" or (found.verdict, found.n) == ("futile", first)
        assert not found.certified or found.n < first


def test_losses_of_pairs():
    """Nested loops over what the docstring says, with scores below 0 and pictures without one."""
    s = [0.9, 0.5, -0.2, math.nan, 0.9, 0.3, 0.0]
    p = [0.85, 0.9, 0.4, 0.5, math.nan, -0.5, -0.1]
    for relative in (True, False):
        for higher in (True, False):
            losses, shares = Tolerance(0.02, relative, higher).losses(np.array(s), np.array(p), 0.2)
            for i in range(len(s)):
                dense, pruned = (max(one, 0) if relative and one == one else one for one in (s[i], p[i]))
                loss = dense - pruned if higher else pruned - dense
                wanted = 0.2 if loss != loss else min(max(loss, -0.2), 0.2)
                assert losses[i] == pytest.approx(wanted)
                assert shares[i] == (1 if not relative else 0 if dense != dense else dense)


def test_caps():
    assert Tolerance(0.02).cap(np.array([0.8, 1.0, -3.0, math.nan])) == pytest.approx(10 * 0.02 * 1.8 / 4)
    assert Tolerance(0.5, relative=False).cap(np.array([])) == 5
    for dense in ([], [0.0, -1.0], [math.nan]):
        with pytest.raises(InputError, match="--model.absolute=true"):
            Tolerance(0.02).cap(np.array(dense))


@pytest.mark.parametrize(("value", "relative"), [(0, True), (-0.1, True), (1.1, True), (math.nan, True), (0, False)])
def test_tolerances_that_are_none(value, relative):
    with pytest.raises(InputError, match=r"tolerance is .*: give .* above 0"):
        Tolerance(value, relative)


def test_equal_images_are_certified_and_broken_ones_given_up():
    tolerance, s = Tolerance(0.02), np.full(256, 0.3)
    cap = tolerance.cap(s)
    for pruned, verdict, most in ((s, "certified", 80), (s * 0, "futile", 32), (s * math.nan, "futile", 32)):
        losses, shares = tolerance.losses(s, pruned, cap)
        found = decide(losses - 0.02 * shares, cap, 0.01, 256)
        assert (found.verdict, found.n <= most) == (verdict, True)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 8, 31, 40])
def test_the_tree_finds_every_threshold_in_m_probes(levels):
    for truth in range(levels + 1):
        tree, probes = Bisection(levels), 0
        assert tree.left == math.ceil(math.log2(levels + 1))
        while tree.next is not None:
            before = tree.left
            assert 1 <= tree.next <= levels
            tree.answer(tree.next <= truth)
            probes += 1
            assert tree.left < before
        assert tree.best == truth
        assert probes <= Bisection.depth(levels)


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 40), (17, 256), (9, 9)])
def test_the_share_bound_is_that_of_the_beta_distribution(count, n):
    from scipy.stats import beta

    wanted = 1.0 if count == n else beta.ppf(0.95, count + 1, n - count)
    assert share_bound(count, n) == pytest.approx(wanted, abs=1e-9)


def test_the_bound_of_the_loss_is_where_the_test_turns():
    chance = np.random.default_rng(3)
    s = chance.uniform(0.8, 1, 128)
    losses, cap = np.clip(chance.normal(0.004, 0.03, 128), -0.18, 0.18), 0.18
    bound = upper_bound(losses, s, cap, 0.02, 0.05)
    assert 0.004 < bound < 0.02
    for tolerance, certified in ((bound + 0.0005, True), (bound - 0.0006, False)):
        assert (max(wealth_by_fractions((losses - tolerance * s)[:128].tolist(), cap)) >= 20) == certified
    assert upper_bound(np.full(64, cap), s[:64], cap, 0.02, 0.05) is None


class World:
    """Paired scores of prompts by level: most pictures change a little, a few break wholly, ever more by level.

    The capped loss of the level at the boundary is exactly the tolerance in the population of 2,000 prompts, from
    which searches draw theirs with replacement.
    """

    def __init__(self, levels, boundary, tolerance, broken, spread):
        chance, n = np.random.default_rng(0), 2000
        self.dense = np.clip(chance.normal(0.3, 0.04, n), 0.1, None)
        self.cap, self.tolerance = tolerance.cap(self.dense), tolerance
        noise = chance.normal(0, spread, (levels, n))
        order, size = chance.permutation(n), tolerance.value * self.dense.mean()
        self.pruned = np.empty((levels + 1, n))
        for level in range(1, levels + 1):
            wanted = size * (1.0 if level == boundary else (level / boundary) ** 3)
            kept = self.dense - noise[level - 1]
            loss = kept * 0 + noise[level - 1]
            loss[order[: int(broken * n * level / boundary)]] = self.cap
            for _ in range(60):  # a shift of all makes the mean capped loss what it should be
                capped = np.clip(loss, -self.cap, self.cap)
                loss += wanted - capped.mean()
            self.pruned[level] = self.dense - loss
        losses = [tolerance.losses(self.dense, one, self.cap)[0].mean() for one in self.pruned[1:]]
        self.truth = sum(one <= size * (1 - 1e-9) for one in losses)
        assert losses[boundary - 1] == pytest.approx(size, rel=1e-6)

    def search(self, chance, n_max=256):
        """The level found with prompts drawn anew, and the pruned images used."""
        drawn = chance.integers(0, len(self.dense), n_max)
        tree, images = Bisection(len(self.pruned) - 1), 0
        alpha = ALPHA / tree.left
        while (level := tree.next) is not None:
            losses, shares = self.tolerance.losses(self.dense[drawn], self.pruned[level][drawn], self.cap)
            found = decide(losses - self.tolerance.value * shares, self.cap, alpha, n_max)
            tree.answer(found.certified)
            images += found.n
        return tree.best, images


@pytest.mark.parametrize(("broken", "spread"), [(0.004, 0.004), (0.0, 0.015)], ids=["few break", "none breaks"])
def test_certificates_are_wrong_in_at_most_one_of_twenty(broken, spread):
    """The level just above the truth lies exactly at the tolerance, where a false certificate is likeliest."""
    world, chance, searches = World(31, 14, Tolerance(0.02), broken, spread), np.random.default_rng(7), 200
    found = [world.search(chance) for _ in range(searches)]
    false = sum(level > world.truth for level, _ in found)
    assert world.truth == 13
    most = next(k for k in range(searches) if _binomial_tail(k, searches, ALPHA) < 0.001)
    assert false < most, (false, most)
    steps = np.array([world.truth - level for level, _ in found])
    assert np.quantile(steps, 0.9) <= (4 if broken else 6)
    assert np.mean([images for _, images in found]) < 5 * 256 / 2


def _binomial_tail(count, n, share):
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(count, n + 1))
