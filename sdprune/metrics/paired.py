"""Uncertainty of a score, and of the difference of two models on the same prompts and noise."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics.frechet import Statistics, feature_statistics, frechet_distance, symmetric_sqrt


@dataclass(frozen=True)
class Interval:
    """A difference with its bootstrap interval and standard error, in the score's own units."""

    estimate: float
    low: float
    high: float
    se: float

    def as_dict(self, name: str) -> dict[str, float]:
        """`{name, name_low, name_high, name_se}` for a record."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_se": self.se}


@runtime_checkable
class BatchedStatistic(Protocol):
    """A statistic of rows [n, ...] that can evaluate all resamples of them faster than one by one."""

    def __call__(self, rows: Tensor) -> float:
        """Value on rows [n, ...]."""

    def resampled(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Values [resamples] float64 on `rows[index]` for each index of `indices` [resamples, n]."""


class _Mean:
    """Mean over images of scores [n]."""

    def __call__(self, rows: Tensor) -> float:
        return rows.double().mean().item()

    def resampled(self, rows: Tensor, indices: Tensor) -> Tensor:
        return rows.double()[indices].mean(1)


mean = _Mean()


class FrechetTo:
    """Frechet distance of feature rows [n, d] to fixed statistics, fast over many resamples.

    With the reference's root R, the generated side only enters through Y = (X - mu_r) R: a resample's cross term is
    the sum of the singular values of its centred Y / sqrt(n - 1). These come from whichever Gram matrix is smaller,
    features by features or distinct images by distinct images (63 % of n), by one eigenvalue problem a resample.
    On one core: 1 ms at n = 256, d = 128; 0.3 s at n = 10,000, d = 512; 5 s at n = 10,000, d = 2,048.
    """

    def __init__(self, reference: Statistics) -> None:
        self.reference = reference
        self._root = symmetric_sqrt(reference.sigma)

    def __call__(self, rows: Tensor) -> float:
        """The distance itself."""
        own = feature_statistics(rows)
        return frechet_distance(self.reference.mu, self.reference.sigma, own.mu, own.sigma)

    def resampled(self, rows: Tensor, indices: Iterable[Tensor]) -> Tensor:
        """Distances [resamples] of `rows[index]` for each index [any length] of `indices`."""
        centered = rows.to("cpu", torch.float64) - self.reference.mu
        rotated = centered @ self._root
        # Only n x n products are worth keeping for all resamples, and only while they are the smaller ones.
        gram = rotated @ rotated.T if len(rows) <= 2 * rows.shape[1] else None
        fixed = self.reference.sigma.trace()
        values = [
            _shift_and_trace(centered, counts) + fixed - 2 * _cross_term(rotated, gram, counts)
            for counts in (torch.bincount(index, minlength=len(rows)).double() for index in indices)
        ]
        return torch.stack(values).clamp(min=0)


def _shift_and_trace(centered: Tensor, counts: Tensor) -> Tensor:
    """|mean|^2 plus the trace of the covariance of a resample; `centered` holds rows minus the reference mean."""
    n = counts.sum()
    shift = (counts @ centered / n).square().sum()
    total = counts @ centered.square().sum(1)
    return shift + (total - n * shift) / (n - 1)


def _cross_term(rotated: Tensor, gram: Tensor | None, counts: Tensor) -> Tensor:
    """Tr (R S R)^1/2 for the covariance S of a resample that holds row i `counts[i]` times."""
    n, drawn = counts.sum(), counts.nonzero().squeeze(1)
    if gram is not None and len(drawn) < rotated.shape[1]:
        weights = counts[drawn]
        products = gram[drawn][:, drawn]
        towards_mean = products @ weights / n
        products = products - towards_mean[:, None] - towards_mean + weights @ towards_mean / n
        scale = weights.sqrt()
        products = products * scale[:, None] * scale
    else:
        around_mean = rotated - counts @ rotated / n
        products = around_mean.T @ (around_mean * counts[:, None])
    return torch.linalg.eigvalsh(products / (n - 1)).clamp(min=0).sqrt().sum()


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
    if isinstance(statistic, BatchedStatistic):
        return statistic.resampled(rows, indices)
    return torch.tensor([statistic(rows[index]) for index in indices], dtype=torch.float64)
