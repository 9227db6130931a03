"""A test that a loss is small, which may be looked at after any picture, and the tree of levels that it is used on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sdprune.errors import InputError

ALPHA = 0.05
"""The risk of a false claim."""
CAP = 10
"""How many tolerances the loss of one picture counts for at most."""
FIRST, EVERY, FUTILE = 16, 8, 32
"""Pictures before the first look, between two looks, and before the first look that may give up."""
_FIRST_BET, _LARGEST_BET, _PRIOR, _PRIOR_SIZE = 0.3, 0.95, 0.15, 4
_BOUNDS = 401


@dataclass(frozen=True)
class Tolerance:
    """How much worse than the dense model's images the pruned model's may be, in the mean over prompts.

    With s the dense and p the pruned score of a prompt, its loss is l = s - p (p - s where lower is better). An
    absolute tolerance t is in the units of the score; the claim is E[l] <= t, and the excess of a prompt is

        x = clip(l, -W, W) - t.

    A relative tolerance tau is a share of the dense score; the claim is E[l] <= tau E[s], and with scores below 0
    taken for 0,

        x = clip(l, -W, W) - tau s.

    The cap W is in the units of the score: CAP tolerances, CAP * t or CAP * tau * (mean dense score of prompts that
    are used for nothing else). Where one of the two scores is no finite number, the loss is W; such a dense score
    counts as 0.

    Args:
        value: the tolerance.
        relative: whether it is a share of the dense score.
        higher_is_better: of the score.
    """

    value: float
    relative: bool = True
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf or (self.relative and self.value > 1):
            kind = "a share of the dense score above 0, at most 1" if self.relative else "a number above 0"
            raise InputError(
                f"tolerance is {self.value}: give {kind}, as in 0.02; no number of images shows that nothing is lost."
            )

    def written(self, loss: float, sign: str = "+") -> str:
        """A loss, or a tolerance, for people: a share in per cent."""
        return f"{100 * loss:{sign}.2f} %" if self.relative else f"{loss:{sign}.3g}"

    def cap(self, dense: np.ndarray) -> float:
        """W; `dense` are scores [n] of prompts that no other test looks at, which only a relative tolerance needs.

        Raises:
            InputError: the dense scores have no positive mean, so that no share of it can be lost.
        """
        if not self.relative:
            return CAP * self.value
        mean = float(np.maximum(np.nan_to_num(_finite(dense)), 0).mean()) if len(dense) else 0.0
        if mean <= 0:
            raise InputError(
                "The dense model's mean score is not above 0, so that no share of it can be tolerated: give a "
                "tolerance in units of the score, with --model.absolute=true."
            )
        return CAP * self.value * mean

    def losses(self, dense: np.ndarray, pruned: np.ndarray, cap: float) -> tuple[np.ndarray, np.ndarray]:
        """Capped losses [n] of pairs of scores [n], and what a tolerance is a share of, [n]: dense scores, or 1."""
        s, p = map(_finite, (dense, pruned))
        if self.relative:
            s, p = np.maximum(s, 0), np.maximum(p, 0)  # NaN stays
        loss = s - p if self.higher_is_better else p - s
        loss = np.clip(np.where(np.isnan(loss), cap, loss), -cap, cap)
        return loss, np.nan_to_num(s) if self.relative else np.ones(len(s))


def _finite(scores: np.ndarray) -> np.ndarray:
    """Scores with NaN for all that are no finite numbers."""
    found = np.asarray(scores, dtype=float)
    return np.where(np.isfinite(found), found, np.nan)


def wealth(excess: Iterable[Any], cap: float) -> Iterator[Any]:
    """The wealth E_1, E_2, ... of bets that the mean excess is below 0: evidence against a loss beyond the tolerance.

        E_i = E_{i-1} (1 - lambda_i x_i),  lambda_1 = .3 / W,
        lambda_{i+1} = clip(-mu / (v + mu^2), 0, .95 / W),
        mu = S / (i + 4),  v = (4 (.15 W)^2 + Q) / (i + 4) - mu^2,

    with S and Q the sums of x and x^2 so far. If the mean excess is 0 or more, E is a nonnegative supermartingale:
    lambda_i depends on earlier pictures only, so E[1 - lambda_i x_i | past] = 1 - lambda_i E[x_i] <= 1 for
    lambda_i >= 0; and since x_i <= W (the tolerance that is subtracted is not negative), lambda_i <= .95 / W keeps
    every factor at .05 or above. By Ville's inequality it then ever reaches 1 / alpha with probability alpha at most,
    however often it is looked at.

    Source: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024.

    Args:
        excess: of prompts in random order, each at most `cap`; numbers, or arrays for several tests at once.
        cap: W.
    """
    value, total, squares = 1.0, 0.0, _PRIOR_SIZE * (_PRIOR * cap) ** 2
    bet: Any = _FIRST_BET / cap
    for one in excess:
        value = value * (1 - bet * one)
        yield value
        total, squares = total + one, squares + one * one
        bet = -total / squares  # (i + 4) cancels in mu / (v + mu^2)
        most = _LARGEST_BET / cap
        bet = min(max(bet, 0.0), most) if isinstance(bet, float) else np.clip(bet, 0, most)


class Decision(NamedTuple):
    """What a test came to."""

    verdict: str
    """`certified`; `futile`, where it will hardly be; `undecided` after all pictures that it may have."""
    n: int
    """Pictures that it looked at."""
    e_value: float

    @property
    def certified(self) -> bool:
        """Whether the loss is within the tolerance."""
        return self.verdict == "certified"


def decide(excess: np.ndarray, cap: float, alpha: float, n_max: int) -> Decision | None:
    """The decision at the first look that decides, whatever comes later; None where more pictures are needed.

    It looks after FIRST pictures, then after every EVERY ones, and after n_max. E >= 1 / alpha certifies. From FUTILE
    on it gives up where

        mean(x) - 1.5 sd / sqrt(n) > -sd sqrt(2 ln(1 / alpha) / n_max),

    that is where the mean, one and a half standard errors better than it looks, would not do for n_max pictures. Giving
    up claims nothing, so it costs power only.

    Args:
        excess: [n], see `Tolerance`.
        cap: W.
        alpha: the risk that a loss beyond the tolerance is certified.
        n_max: how many pictures it may have.
    """
    x = np.asarray(excess, dtype=float)[:n_max]
    for n, e_value in enumerate(wealth(x.tolist(), cap), 1):
        if (n < FIRST or n % EVERY) and n < n_max:
            continue
        if e_value >= 1 / alpha:
            return Decision("certified", n, e_value)
        if n == n_max:
            return Decision("undecided", n, e_value)
        if n >= FUTILE:
            mean, sd = x[:n].mean(), x[:n].std(ddof=1)
            if mean - 1.5 * sd / math.sqrt(n) > -sd * math.sqrt(2 * math.log(1 / alpha) / n_max):
                return Decision("futile", n, e_value)
    return None


def fewest(alpha: float) -> int:
    """How many images certify a level that loses nothing."""
    losses = itertools.repeat(-1 / CAP)
    return next(n for n, e_value in enumerate(wealth(losses, 1.0), 1) if n >= FIRST and e_value >= 1 / alpha)


def upper_bound(losses: np.ndarray, shares: np.ndarray, cap: float, tolerance: float, alpha: float) -> float | None:
    """The smallest tolerance that these pictures certify, however often they were looked at; None above CAP of them.

    Args:
        losses: [n], capped.
        shares: [n], what a tolerance is a share of.
        cap: W.
        tolerance: the scale of the answer, which is a multiple of a fortieth of it.
        alpha: the risk.
    """
    tried = np.linspace(0, CAP * tolerance, _BOUNDS)
    most = np.ones(_BOUNDS)
    for value in wealth((loss - tried * share for loss, share in zip(losses, shares, strict=True)), cap):
        most = np.maximum(most, value)
    certified = most >= 1 / alpha
    refused = np.flatnonzero(~certified)
    place = refused[-1] + 1 if len(refused) else 0
    return None if place == _BOUNDS else float(tried[place])


class Bisection:
    """The search for the highest level among 1 .. K that a test certifies; 0 is the dense model.

    The tree is fixed before any picture is seen, and m = ceil(log2(K + 1)) probes at most lead from its root to an
    answer. With alpha / m for each probe, and the same prompts in the same order for all, a level whose loss is beyond
    the tolerance is certified with probability alpha at most, if the loss does not fall from one level to the next:
    then all such levels lie above the others. Below a sound level that was not certified all are sound. So unsound
    levels that are probed before the first false certificate lie on the one path that turns up at sound levels and down
    at unsound ones. They are m at most, and their risks add up to alpha, however they depend on each other.
    """

    def __init__(self, levels: int) -> None:
        self.best, self._refused = 0, levels + 1

    @staticmethod
    def depth(levels: int) -> int:
        """m, the most probes that K levels take."""
        return math.ceil(math.log2(levels + 1))

    @property
    def next(self) -> int | None:
        """The level to probe; None where `best` is the answer."""
        return None if self._refused - self.best == 1 else (self.best + self._refused) // 2

    @property
    def left(self) -> int:
        """The most probes that are left."""
        return self.depth(self._refused - self.best - 1)

    def answer(self, certified: bool) -> None:
        """The level `next` was certified or not."""
        level = self.next
        assert level is not None
        if certified:
            self.best = level
        else:
            self._refused = level


def share_bound(count: int, n: int, alpha: float = ALPHA) -> float:
    """The exact upper bound of a share that was seen `count` times in n.

    Source: Clopper & Pearson, "The use of confidence or fiducial limits", Biometrika 1934.
    """
    low, high = 0.0, 1.0
    if count == n:
        return 1.0
    ways = [math.log(math.comb(n, k)) for k in range(count + 1)]  # too many for a float from n = 1,030 on
    for _ in range(60):
        share = (low + high) / 2
        tail = sum(math.exp(w + k * math.log(share) + (n - k) * math.log1p(-share)) for k, w in enumerate(ways))
        low, high = (share, high) if tail > alpha else (low, share)
    return high
