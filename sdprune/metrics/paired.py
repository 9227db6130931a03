"""Uncertainty of a score, and of the difference of two models on the same prompts and noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdprune.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval and standard error, in the score's own units."""

    estimate: float
    low: float
    high: float
    se: float

    def as_dict(self, name: str) -> dict[str, float]:
        """`{name, name_low, name_high, name_se}` for a record."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_se": self.se}


class _Mean:
    """Mean over images of scores [n]."""

    def __call__(self, rows: Tensor) -> float:
        return rows.double().mean().item()

    def resampled(self, rows: Tensor, indices: Tensor) -> Tensor:
        return rows.cpu().double()[indices].mean(1)


mean = _Mean()


def require_tolerance(tolerance: float | None) -> float | None:
    """Raise InputError for a tolerance that is no share."""
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"tolerance must lie between 0 and 1, a share of the dense model's score, got {tolerance}.")
    return tolerance


def verdict(dense: float, low: float, high: float, tolerance: float, higher_is_better: bool) -> str:
    """Whether a difference stays inside a tolerance, by its 95 % interval.

    Args:
        dense: the dense model's score.
        low: lower end of the interval of pruned minus dense.
        high: its upper end.
        tolerance: how much worse the pruned model may be, as a share of the dense model's score.
        higher_is_better: of the score.

    Returns:
        `within`: even the worse end of the interval is tolerated; `beyond`: even its better end is not; else
        `undecided`: more images would be needed.
    """
    best, worst = (-high, -low) if higher_is_better else (low, high)
    allowed = abs(dense) * tolerance
    return "within" if worst <= allowed else "beyond" if best > allowed else "undecided"


def normal_interval(estimate: float, shares: Tensor) -> Interval:
    """A 95 % interval from each image's share [n] in an estimate: its standard error is that of the shares' mean.

    Source: the delta method for U-statistics, Hoeffding 1948 (van der Vaart, "Asymptotic Statistics", theorem 12.3).
    """
    se = standard_error(shares)
    return Interval(estimate, estimate - 1.96 * se, estimate + 1.96 * se, se)


def jackknife_interval(estimate: float, without: Tensor) -> Interval:
    """A 95 % interval from an estimate's values without each image in turn, [n].

    The jackknife's variance is, in expectation, at least the estimate's, at any number of images.

    Source: Efron & Stein, "The Jackknife Estimate of Variance", Annals of Statistics 1981, theorem 2.
    """
    return normal_interval(estimate, (1 - len(without)) * without)


def standard_error(scores: Tensor) -> float:
    """Standard error of the mean of independent scores [n]: their sample deviation over sqrt(n).

    Raises:
        InputError: fewer than two scores.
    """
    if len(scores) < 2:
        raise InputError(f"A standard error needs at least 2 images, got {len(scores)}.")
    return (scores.double().std(correction=1) / len(scores) ** 0.5).item()


def resample_indices(n: int, resamples: int, seed: int) -> Tensor:
    """Indices [resamples, n] drawn with replacement from 0 .. n - 1; the same for the same arguments everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, n, size=(resamples, n)))


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    statistic: Callable[[Tensor], float],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    centered: bool = False,
) -> Interval:
    """Percentile bootstrap of `statistic(a) - statistic(b)` over images, resampling both by the same images.

    Args:
        a: rows [n, ...] of one model, row i for image i.
        b: rows [n, ...] of the other model for the same images.
        statistic: maps rows to a number; one with a `resampled` method (`mean`, `FrechetTo`) is evaluated faster.
        resamples: number of resamples; 1,000 gives 95 % limits to about a tenth of the interval's width.
        seed: seed of the resampling, not of any image.
        confidence: between 0 and 1.
        centered: move the resamples so that their mean is the difference itself, for a statistic that resampling
            shifts. FID needs it: a resample repeats images and so counts as a smaller sample with a larger FID. In
            simulations of 128 to 1,000 images with 16 to 128 features the plain 95 % interval held the expected
            difference in 0 to 93 % of the cases, the centered one in 92 to 100 %.

    Returns:
        The difference on all images, the interval, and the resamples' standard deviation.

    Raises:
        InputError: rows that do not pair, fewer than two images or resamples, or a confidence outside (0, 1).

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
    """
    if len(a) != len(b) or len(a) < 2:
        raise InputError(
            f"A paired bootstrap needs the same 2 or more images on both sides, got {len(a)} and {len(b)}."
        )
    if resamples < 2:
        raise InputError(f"A bootstrap needs at least 2 resamples, got {resamples}.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}.")
    indices = resample_indices(len(a), resamples, seed)
    estimate = statistic(a) - statistic(b)
    draws = _evaluate(statistic, a, indices) - _evaluate(statistic, b, indices)
    if centered:
        draws = draws - draws.mean() + estimate
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws.numpy(), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), draws.std(correction=1).item())


def _evaluate(statistic: Callable[[Tensor], float], rows: Tensor, indices: Tensor) -> Tensor:
    """Values [resamples] float64 on `rows[index]` for each index of `indices` [resamples, n]."""
    if hasattr(statistic, "resampled"):  # evaluates all faster than one by one
        return statistic.resampled(rows, indices)
    return torch.tensor([statistic(rows[index]) for index in indices], dtype=torch.float64)
