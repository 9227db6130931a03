"""The certificate of `sdprune search`: formulas against nested loops, claims against simulated truths."""

import math
from fractions import Fraction

import numpy as np
import pytest
from searching import run, simulate

from sdprune.errors import InputError
from sdprune.search.certificate import ALPHA, Bisection, Tolerance, decide, share_bound, upper_bound, wealth
from sdprune.search.search import CERTIFICATE, Model, Search


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
            return mean - 1.5 * sd / math.sqrt(n) > -sd * math.sqrt(2 * math.log(100) / 256)

        first = next((n for n in range(32, 257, 8) if hopeless(n)), 257)
        assert found.verdict == "certified" or (found.verdict, found.n) == ("futile", first)
        assert not found.certified or found.n < first


def test_losses_of_pairs():
    """Nested loops over what the docstring says, with scores below 0 and pictures without one."""
    s = [0.9, 0.5, -0.2, math.nan, 0.9, 0.3, 0.0, math.inf, 0.5]
    p = [0.85, 0.9, 0.4, 0.5, math.nan, -0.5, -0.1, 0.5, math.inf]
    for relative in (True, False):
        for higher in (True, False):
            losses, shares = Tolerance(0.02, relative, higher).losses(np.array(s), np.array(p), 0.2)
            for i in range(len(s)):
                dense, pruned = (max(one, 0) if relative and one == one else one for one in (s[i], p[i]))
                loss = dense - pruned if higher else pruned - dense
                there = math.isfinite(s[i]) and math.isfinite(p[i])
                assert losses[i] == pytest.approx(min(max(loss, -0.2), 0.2) if there else 0.2)
                assert shares[i] == (1 if not relative else dense if math.isfinite(dense) else 0)


def test_caps():
    assert Tolerance(0.02).cap(np.array([0.8, 1.0, -3.0, math.nan, math.inf])) == pytest.approx(10 * 0.02 * 1.8 / 5)
    assert Tolerance(0.5, relative=False).cap(np.array([])) == 5
    for dense in ([], [0.0, -1.0], [math.nan]):
        with pytest.raises(InputError, match="--model\\.absolute=true"):
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


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 40), (17, 256), (9, 9), (600, 2000)])
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
    """Paired scores of 2,000 prompts at 31 levels of two components: most pictures change a little, a few break wholly.

    The mean capped loss of level 14 is exactly the tolerance. Losses of two components add up.
    """

    levels, boundary = 31, 14

    def __init__(self, tolerance, broken, spread):
        chance, n = np.random.default_rng(0), 2000
        self.tolerance, self.n = tolerance, n
        self.dense = np.clip(chance.normal(0.3, 0.04, n), 0.1, None)
        self.cap, self.size = tolerance.cap(self.dense), tolerance.value * self.dense.mean()
        self.loss = {
            name: [np.zeros(n), *(self.level(chance, level, broken, spread) for level in range(1, self.levels + 1))]
            for name in ("text_encoder", "unet")
        }

    def level(self, chance, level, broken, spread):
        """Losses [n] whose mean, once capped, is (level / boundary)^3 tolerances, and no more than 8."""
        loss = chance.normal(0, spread, self.n)
        loss[chance.permutation(self.n)[: int(broken * self.n * level / self.boundary)]] = self.cap
        for _ in range(60):
            loss += self.size * min((level / self.boundary) ** 3, 8) - np.clip(loss, -self.cap, self.cap).mean()
        return loss

    def scores_of(self, model):
        places = {name: round(share * 40) for name, share in model.sparsities.items()}
        return self.dense - sum((self.loss[name][place] for name, place in places.items()), np.zeros(self.n))

    def true_loss(self, model):
        """In tolerances, from all prompts."""
        return self.tolerance.losses(self.dense, self.scores_of(model), self.cap)[0].mean() / self.size

    def simulate(self, names, searches):
        levels = [level / 40 for level in range(1, self.levels + 1)]
        return simulate(self.tolerance, names, levels, self.scores_of, self.n, searches)


def tolerated(searches):
    """More false claims than these have a probability below 1 in 1,000, if each has one of 5 %."""
    return next(k for k in range(searches) if tail(k + 1, searches) < 0.001)


def tail(count, n, share=ALPHA):
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(count, n + 1))


@pytest.mark.parametrize(("broken", "spread"), [(0.004, 0.004), (0.0, 0.015)], ids=["few break", "none breaks"])
def test_thresholds_are_wrong_in_at_most_one_of_twenty(broken, spread):
    """The level above the best one lies exactly at the tolerance, where a false certificate is likeliest."""
    world, searches = World(Tolerance(0.02), broken, spread), 250
    assert world.true_loss(Model({"unet": 14 / 40})) == pytest.approx(1)
    found, images, false = [], [], 0
    for search in world.simulate(["unet"], searches):
        level = round(40 * search.thresholds["unet"].sparsities.get("unet", 0))
        found.append(13 - level)
        images.append(search.images()["pruned"])
        false += level >= 14
    assert false <= tolerated(searches)
    assert np.quantile(found, 0.9) <= (4 if broken else 6)
    assert np.mean(images) < 31 * 256 / 8


def test_what_is_found_together_is_wrong_in_at_most_one_of_twenty():
    """Of joint models with losses that add up; with at most a tenth of the images of a grid."""
    world, searches = World(Tolerance(0.02), 0.004, 0.004), 100
    found = list(world.simulate(["text_encoder", "unet"], searches))
    images = [search.images() for search in found]
    assert np.mean([one["pruned"] + one["dense"] for one in images]) < images[0]["grid"] / 10
    answers = [search.answer for search in found]
    losses = [world.true_loss(one.model) for one in answers if one is not None]
    assert len(losses) > 0.9 * searches
    assert sum(loss > 1 for loss in losses) <= tolerated(searches)
    assert np.median(losses) > 0.3
    assert {one.part for one in answers if one is not None} == {CERTIFICATE}


@pytest.mark.parametrize(("tolerance", "wanted"), [(1.0, 31), (1e-6, 0)], ids=["nothing misses", "nothing meets"])
def test_tolerances_at_the_ends(tolerance, wanted):
    world = World(Tolerance(0.02), 0.004, 0.004)
    world.tolerance = Tolerance(tolerance)
    for search in world.simulate(["unet"], 3):
        assert round(40 * search.thresholds["unet"].sparsities.get("unet", 0)) == wanted
        assert (search.answer is None) == (wanted == 0)


def test_a_certificate_that_fails_steps_back_at_half_the_risk():
    """On fresh prompts the models of the path are worse than they were on those of the search."""
    n, dense = 256, np.full(2 * 256 + 16, 0.5)
    paths = {name: [Model({name: level / 10}) for level in range(1, 8)] for name in ("text_encoder", "unet")}

    def scores_of(model):
        bad = sum(model.sparsities.values()) > 0.85
        loss = np.where(np.arange(len(dense)) < n, 0.0, 0.2 if bad else 0.0)
        return dense - loss

    search = run(Search(Tolerance(0.02), paths, n), scores_of, np.arange(len(dense)))
    tests = [one for one in search.probes if one.path == "certificate"]
    assert [one.model.sparsities["unet"] for one in tests] == [0.7, 0.6, 0.5, 0.4]
    assert [one.alpha for one in tests] == [ALPHA / 2, ALPHA / 4, ALPHA / 8, ALPHA / 16]
    assert [one.verdict for one in tests] == ["futile"] * 3 + ["certified"]
    assert search.answer is tests[-1]


def test_the_first_joint_model_is_expected_to_lose_half_a_tolerance():
    """Losses without noise that add up: the sparsest model on the way back from both limits that loses no more."""
    share = {"text_encoder": 0.0019, "unet": 0.0016}  # lost by a level, of a tolerance of 0.02
    paths = {name: [Model({name: level / 10}) for level in range(1, 10)] for name in share}

    def scores_of(model):
        lost = sum(share[name] * round(10 * level) for name, level in model.sparsities.items())
        return np.full(2 * 256 + 16, 1 - lost)

    search = run(Search(Tolerance(0.02), paths, 256), scores_of, np.arange(2 * 256 + 16))
    thresholds = [round(10 * search.thresholds[name].sparsities[name]) for name in share]
    wanted = next(
        back
        for back in range(9)
        if sum(lost * (level - back) for lost, level in zip(share.values(), thresholds, strict=True)) <= 0.01
    )
    first = next(one for one in search.probes if one.part == CERTIFICATE)
    assert [round(10 * level) for level in first.model.sparsities.values()] == [one - wanted for one in thresholds]
    assert not any(one.part != CERTIFICATE and len(one.model.sparsities) > 1 for one in search.probes)


def test_a_loss_that_falls_with_sparsity_is_seen_and_certified_anew():
    """Level 2 of 3 is bad and level 3 is not; nothing but its own certificate holds for what lies below."""
    noise = np.random.default_rng(0).normal(0, 0.001, 2 * 128 + 16)
    loss = {1: 0.0045, 2: 0.0, 3: 0.05}
    path = [Model({"unet": level / 10}) for level in loss]

    def scores_of(model):
        return (
            0.5
            + noise * bool(model.sparsities)
            - (loss[round(10 * model.sparsities["unet"])] if model.sparsities else 0)
        )

    search = Search(Tolerance(0.02), {"unet": path}, 128)
    run(search, scores_of, np.arange(len(noise)))
    assert not search.falls("unet")
    loss[3], loss[2] = 0.0, 0.004
    search = run(Search(Tolerance(0.02), {"unet": path}, 128), scores_of, np.arange(len(noise)))
    assert search.falls("unet")
    assert search.answer.part == CERTIFICATE


def test_any_chunks_come_to_the_same_answer():
    world, order = World(Tolerance(0.02), 0.004, 0.004), np.random.default_rng(5).integers(0, 2000, 2 * 256 + 16)
    paths = {name: [Model({name: level / 40}) for level in range(4, 32)] for name in ("text_encoder", "unet")}
    also = Model({"text_encoder": 0.2, "unet": 0.1})
    found = [
        run(Search(Tolerance(0.02), paths, 256, also=also), world.scores_of, order, chunk) for chunk in (8, 40, 256)
    ]
    for one in found[1:]:
        assert [(p.model, p.part, p.alpha, p.decision, p.loss) for p in one.probes] == [
            (p.model, p.part, p.alpha, p.decision, p.loss) for p in found[0].probes
        ]
    again = Search(Tolerance(0.02), paths, 256, also=also)
    again.scores = found[0].scores
    assert list(again.work()) == []
    assert again.answer.model == found[0].answer.model


def test_the_shape_of_a_drop():
    """Losses that follow the law give its numbers back."""
    s = np.arange(1, 16) / 20
    for a, b, shape in ((0.02, 1.0, "gradual"), (0.02, 6.0, "sudden")):
        path = [Model({"unet": float(one)}) for one in s]
        search = Search(Tolerance(0.02), {"unet": path}, 256)

        def scores_of(model, a=a, b=b):
            share = model.sparsities.get("unet", 0.0)
            return np.full(600, 0.5) * (1 - a * (share / (1 - share)) ** b)

        run(search, scores_of, np.arange(2 * 256 + 16) % 600)
        found = search.shape("unet")
        assert found["shape"] == shape
        assert found["one_tolerance"] == pytest.approx(0.5, abs=0.03)
        assert found["b"] == pytest.approx(b, rel=0.35)
