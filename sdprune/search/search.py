"""What a search looks at next, and what it has found: a function of scores alone, whoever draws the pictures."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from sdprune.search.certificate import (
    ALPHA,
    FIRST,
    Bisection,
    Decision,
    Tolerance,
    decide,
    share_bound,
    upper_bound,
)

SCALE, SEARCH, CERTIFICATE = "scale", "search", "certificate"
"""The parts that the prompts are drawn in; no prompt is in two of them."""
VERDICTS = {"certified": "certified", "futile": "given up", "undecided": "not certified"}
"""The decisions for people."""
_PROMISING = 0.5
"""The loss that a joint model is expected to have when it is tested, in tolerances: more is seldom certified."""
_SUDDEN = 0.1
"""Sparsities between a loss of one tolerance and one of five that still count as a sudden drop."""


@dataclass(frozen=True)
class Model:
    """A pruned model: the sparsities of components, or the total of a budget. Nothing of it is the dense model."""

    sparsities: Mapping[str, float] = field(default_factory=dict, hash=False)
    total: float | None = None

    @property
    def name(self) -> str:
        """Its name, also in file names: `text_encoder-0.475-unet-0.35`, `total-0.4`, `dense`."""
        if self.total is not None:
            return f"total-{self.total:g}"
        return "-".join(f"{name}-{share:g}" for name, share in sorted(self.sparsities.items())) or DENSE_NAME

    def __str__(self) -> str:
        if self.total is not None:
            return f"{100 * self.total:g} % in all"
        return ", ".join(f"{name} {100 * share:g} %" for name, share in sorted(self.sparsities.items())) or DENSE_NAME


DENSE_NAME = "dense"
DENSE = Model()


class Wanted(NamedTuple):
    """Scores of a model that the search needs next: those of the part's prompts after the ones that it has."""

    model: Model
    part: str


@dataclass
class Probe:
    """One test of one model, as far as it is."""

    path: str
    """Name of the path that the model lies on."""
    model: Model
    part: str
    alpha: float
    decision: Decision | None = None
    n: int = 0
    loss: float = math.nan
    """Mean capped loss over the mean of what a tolerance is a share of, in the tolerance's units."""
    low: float = math.nan
    """Ends of the loss's plain 95 % interval, which is no claim: the number of images depends on the losses."""
    high: float = math.nan

    @property
    def verdict(self) -> str:
        """What the test came to, if it is over."""
        return self.decision.verdict if self.decision else ""


class Search:
    """Finds the sparsest models whose loss is within the tolerance.

    Each path, models of rising sparsity, is searched by bisection on the same prompts in the same order. With several
    paths, one a component, joint models lie on a path back from their thresholds, all by the same number of steps. The
    sparsest of them whose components lost half a tolerance together is tested on prompts that no test has looked at,
    since the choice depends on what was seen. If that fails, the model one step back is tested, and so on; the attempts
    have the risks alpha / 2, alpha / 4, ...

    Args:
        tolerance: of the loss.
        paths: models of rising sparsity by name of the path.
        n_max: images that a probe may have.
        fresh: whether what is found on a single path is certified on fresh prompts too.
        also: one more model, which is tested on the prompts of the certificate.
    """

    def __init__(
        self, tolerance: Tolerance, paths: Mapping[str, Sequence[Model]], n_max: int, fresh: bool = False,
        also: Model | None = None,
    ) -> None:  # fmt: skip
        self.tolerance, self.paths, self.n_max, self.fresh, self.also = tolerance, dict(paths), n_max, fresh, also
        self.scores: dict[tuple[str, str], list[float]] = {}
        """Scores of each model and part, in the order of the part's prompts; NaN where a picture has none."""
        self.probes: list[Probe] = []
        self.thresholds: dict[str, Model] = {}
        """What each path came to; DENSE where nothing was certified."""
        self.answer: Probe | None = None
        """The test by which the answer was certified, if there is an answer."""
        self.reference: Probe | None = None
        """The test of `also`."""
        self.left = 0
        """Images of pruned models that the path which is searched takes at most from here on."""
        self.cap = math.nan

    def add(self, model: Model, part: str, scores: Sequence[float]) -> None:
        """The next scores of a model."""
        self.scores.setdefault((model.name, part), []).extend(scores)

    def work(self) -> Iterator[Wanted]:
        """What is wanted next; with the scores of an interrupted search it goes on where that was."""
        self.probes, self.thresholds = [], {}
        if self.tolerance.relative:
            while len(self._scores(DENSE, SCALE)) < FIRST:
                yield Wanted(DENSE, SCALE)
        self.cap = self.tolerance.cap(np.array(self._scores(DENSE, SCALE)[:FIRST]))
        for name, models in self.paths.items():
            self.thresholds[name] = yield from self._bisect(name, models)
        self.answer = yield from self._answer()
        if self.also is not None:
            part = CERTIFICATE if any(one.part == CERTIFICATE for one in self.probes) else SEARCH
            self.left = self.n_max
            self.reference = yield from self._probe(Probe("also", self.also, part, ALPHA))
        self.left = 0

    def _answer(self) -> Generator[Wanted, None, Probe | None]:
        sound = {name: found for name, found in self.thresholds.items() if found is not DENSE}
        if not sound:
            return None
        name = next(iter(sound))
        models: Sequence[Model] = self.paths[name]
        best = sound[name]
        if len(sound) > 1:
            models = self._together(list(sound.values()))
            best = next((one for one in reversed(models) if self._forecast(one) <= _PROMISING), models[0])
        elif not self.fresh and not self.falls(name):
            return next(one for one in self.probes if one.path == name and one.model == best)
        for attempt, model in enumerate(reversed(models[: models.index(best) + 1]), 1):
            self.left = self.n_max
            probe = yield from self._probe(Probe("certificate", model, CERTIFICATE, ALPHA / 2**attempt))
            if probe.decision and probe.decision.certified:
                return probe
        return None

    def _together(self, thresholds: Sequence[Model]) -> list[Model]:
        """From the thresholds of several components, all back by the same steps while none is dense."""
        steps = [self.paths[name] for name in self.paths if self.thresholds[name] in thresholds]
        places = [path.index(found) for path, found in zip(steps, thresholds, strict=True)]
        found = []
        for back in range(min(places), -1, -1):
            parts = [path[place - back].sparsities for path, place in zip(steps, places, strict=True)]
            found.append(Model({name: share for part in parts for name, share in part.items()}))
        return found

    def _forecast(self, model: Model) -> float:
        """The loss to expect of a model of several components, in tolerances: the sum of theirs, interpolated between
        what was seen of each."""
        total = 0.0
        for name, level in model.sparsities.items():
            probes = sorted(
                (one for one in self.probes if one.path == name), key=lambda one: one.model.sparsities[name]
            )
            seen = [0.0, *(one.model.sparsities[name] for one in probes)]
            losses = np.maximum.accumulate([0.0, *(one.loss for one in probes)])
            total += float(np.interp(level, seen, losses))
        return total / self.tolerance.value

    def _bisect(self, name: str, models: Sequence[Model]) -> Generator[Wanted, None, Model]:
        tree = Bisection(len(models))
        alpha = ALPHA / tree.left
        while (level := tree.next) is not None:
            self.left = tree.left * self.n_max
            probe = yield from self._probe(Probe(name, models[level - 1], SEARCH, alpha))
            assert probe.decision is not None
            tree.answer(probe.decision.certified)
        return models[tree.best - 1] if tree.best else DENSE

    def _probe(self, probe: Probe) -> Generator[Wanted, None, Probe]:
        self.probes.append(probe)
        left = self.left
        while True:
            dense, pruned = (self._scores(model, probe.part) for model in (DENSE, probe.model))
            n = min(len(dense), len(pruned))
            losses, shares = self.tolerance.losses(np.array(dense[:n]), np.array(pruned[:n]), self.cap)
            probe.decision = decide(losses - self.tolerance.value * shares, self.cap, probe.alpha, self.n_max)
            self._measure(probe, losses, shares)
            self.left = left - probe.n
            if probe.decision is not None:
                return probe
            yield Wanted(DENSE if len(dense) <= len(pruned) else probe.model, probe.part)

    def _measure(self, probe: Probe, losses: np.ndarray, shares: np.ndarray) -> None:
        n = probe.n = probe.decision.n if probe.decision else len(losses)
        losses, shares = losses[:n], shares[:n]
        if n < 2 or not shares.mean() > 0:
            return
        probe.loss = float(losses.mean() / shares.mean())
        error = 1.96 * float((losses - probe.loss * shares).std(ddof=1) / shares.mean()) / math.sqrt(n)
        probe.low, probe.high = probe.loss - error, probe.loss + error

    def _scores(self, model: Model, part: str) -> list[float]:
        return self.scores.get((model.name, part), [])

    def told(self, probe: Probe) -> str:
        """How far a test is, for people: its model, images and loss, and what it came to."""
        loss, low, high = (self.tolerance.written(one) for one in (probe.loss, probe.low, probe.high))
        numbers = "" if math.isnan(probe.loss) else f", loss {loss} [{low}, {high}]"
        place = 1 + next(place for place, one in enumerate(self.probes) if one is probe)
        verdict = f": {VERDICTS[probe.verdict]}" if probe.verdict else ""
        return f"test {place}, {probe.path}, {probe.model}: {probe.n} images{numbers}{verdict}"

    # --- what was found ------------------------------------------------------------------------------------------

    def pairs(self, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
        """Scores [n] of the dense and of the pruned model that a test looked at."""
        dense, pruned = (np.array(self._scores(model, probe.part)[: probe.n]) for model in (DENSE, probe.model))
        return dense, pruned

    def bound(self, probe: Probe) -> float | None:
        """What the loss is at most by a test's pictures, with confidence 1 - alpha at every look; None above CAP
        tolerances."""
        losses, shares = self.tolerance.losses(*self.pairs(probe), self.cap)
        return upper_bound(losses, shares, self.cap, self.tolerance.value, probe.alpha)

    def beyond(self, probe: Probe) -> dict[str, Any]:
        """How many pictures of a test lost W or more, or have no score, with the exact upper bound of their share."""
        losses, _ = self.tolerance.losses(*self.pairs(probe), self.cap)
        count = int((losses >= self.cap).sum())
        return {"count": count, "n": probe.n, "bound": share_bound(count, probe.n)}

    def falls(self, name: str) -> bool:
        """Whether the loss is seen to fall from one level of a path to a sparser one."""
        probes = sorted(
            (one for one in self.probes if one.path == name), key=lambda one: self.paths[name].index(one.model)
        )
        for less, more in combinations(probes, 2):
            losses = [self.tolerance.losses(*self.pairs(one), self.cap)[0] for one in (less, more)]
            n = min(less.n, more.n)
            change = losses[1][:n] - losses[0][:n]
            if n > 1 and change.mean() + 3 * change.std(ddof=1) / math.sqrt(n) < 0:
                return True
        return False

    def shape(self, name: str) -> dict[str, Any] | None:
        """The drop of a component's path: loss = a (s / (1 - s))^b, by least squares weighted by the images' errors.

        An estimate only, where a loss beyond the tolerance was seen. It is called sudden if at most ten points of
        sparsity lie between a loss of one tolerance and one of five.
        """
        probes = [one for one in self.probes if one.path == name and one.n > 1 and len(one.model.sparsities) == 1]
        points = [(*one.model.sparsities.values(), one.loss, (one.high - one.low) / 3.92) for one in probes]
        points = [point for point in points if 0 < point[0] < 1 and math.isfinite(point[1])]
        if len({point[0] for point in points}) < 2 or not any(loss > self.tolerance.value for _, loss, _ in points):
            return None
        s, loss, error = np.array(points).T
        odds, weight = np.log(s / (1 - s)), 1 / (error**2 + (self.tolerance.value / 10) ** 2)
        best = (math.inf, 0.0, 0.0)
        for b in np.linspace(0.25, 16, 64):
            powers = np.exp(b * (odds - odds.max()))
            a = max(float((weight * powers * loss).sum() / (weight * powers**2).sum()), 0.0)
            best = min(best, (float((weight * (loss - a * powers) ** 2).sum()), float(b), a))
        _, b, a = best
        if a == 0:
            return None
        reached = [1 / (1 + math.exp(-(odds.max() + math.log(k * self.tolerance.value / a) / b))) for k in (1, 5)]
        width = reached[1] - reached[0]
        return {
            "a": a * math.exp(-b * float(odds.max())), "b": b, "one_tolerance": reached[0],
            "five_tolerances": reached[1], "shape": "sudden" if width <= _SUDDEN else "gradual",
        }  # fmt: skip

    def images(self) -> dict[str, int]:
        """Images that the tests looked at, all that were drawn, and those of a grid over all levels of all paths."""
        pruned: dict[tuple[str, str], int] = {}
        for one in self.probes:
            key = (one.model.name, one.part)
            pruned[key] = max(pruned.get(key, 0), one.n)
        dense = {
            part: max((n for (_, p), n in pruned.items() if p == part), default=0) for part in (SEARCH, CERTIFICATE)
        }
        return {
            "pruned": sum(pruned.values()),
            "dense": sum(dense.values()) + len(self._scores(DENSE, SCALE)),
            "drawn": sum(map(len, self.scores.values())),
            "grid": self.n_max * (1 + sum(map(len, self.paths.values()))),
        }
