"""Gaussian statistics of features and the Frechet distance between them: pure functions, float64."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.outside import read_npz, reading


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `mu` [d] and covariance `sigma` [d, d] of feature vectors, float64.

    `n` (number of images), `extractor` (protocol name) and the `features` [n, d] themselves, float32, are None in files
    that others made.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None = None
    extractor: str | None = None
    features: Tensor | None = None
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What scores worked out from it, see `once`."""

    @cached_property
    def root(self) -> Tensor:
        """Square root [d, d] of `sigma`, float64."""
        return symmetric_sqrt(self.sigma.double())

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of SHA-256 over mu and sigma."""
        digest = hashlib.sha256(self.mu.numpy().tobytes())
        digest.update(self.sigma.numpy().tobytes())
        return digest.hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Write an npz with the keys `mu` and `sigma` that FID tools exchange, plus ours; whole or not at all."""
        arrays = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy()}
        features = None if self.features is None else self.features.numpy()
        extras = {"n": self.n, "extractor": self.extractor, "features": features}
        arrays |= {key: np.array(value) for key, value in extras.items() if value is not None}
        _write_npz(Path(path), arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read an npz with `mu` [d] and `sigma` [d, d]; all other keys are optional.

        Raises:
            InputError: no such file, not an npz, a missing key, shapes that do not fit, values that are not finite.
        """
        if not Path(path).is_file():
            raise InputError(f"No FID statistics at {str(path)!r}: give an npz file with the keys mu and sigma.")
        arrays = read_npz(Path(path))
        missing = [key for key in ("mu", "sigma") if key not in arrays]
        if missing:
            found = ", ".join(arrays) or "none"
            raise InputError(f"{path} has no {' and no '.join(missing)}. FID statistics need both; found: {found}.")
        with reading(f"{path} holds no statistics of numbers", "Give an npz file with the keys mu and sigma."):
            mu, sigma = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float64)) for key in ("mu", "sigma"))
            n = int(arrays["n"]) if "n" in arrays else None
            features = torch.from_numpy(np.asarray(arrays["features"], np.float32)) if "features" in arrays else None
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise InputError(f"{path} holds mu {list(mu.shape)} and sigma {list(sigma.shape)}; wanted [d] and [d, d].")
        if not all(part.isfinite().all() for part in (mu, sigma, features) if part is not None):
            raise InputError(f"{path} holds values that are not finite.")
        extractor = str(arrays["extractor"]) if "extractor" in arrays else None
        if features is not None and features.shape[1:] != mu.shape:
            raise InputError(f"{path} holds mu {list(mu.shape)} and features {list(features.shape)}; wanted [n, d].")
        return cls(mu, sigma, n, extractor, features)


class Moments:
    """Mean and scatter of feature rows, added batch by batch in float64 (the merge of Chan et al., 1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows [b, d]."""
        rows = rows.detach().double()
        if self.n == 0:
            self.mean, self.scatter = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        total = self.n + len(rows)
        centered = rows - rows.mean(0)
        shift = rows.mean(0) - self.mean
        self.scatter += centered.T @ centered + torch.outer(shift, shift) * (self.n * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.n = total

    def statistics(self, extractor: str | None = None) -> Statistics:
        """Mean and unbiased covariance of everything added.

        Raises:
            InputError: fewer than two rows.
        """
        if self.n < 2:
            raise InputError(f"FID needs at least 2 images for a covariance, got {self.n}.")
        return Statistics(self.mean, self.scatter / (self.n - 1), self.n, extractor)


def feature_statistics(rows: Tensor) -> Statistics:
    """Mean and covariance (divided by n - 1) of feature rows [n, d], in float64 where the rows are.

    Raises:
        InputError: fewer than two rows.
    """
    moments = Moments()
    if len(rows):
        moments.add(rows)
    return moments.statistics()


def symmetric_sqrt(sigma: Tensor) -> Tensor:
    """Square root [d, d] of a symmetric positive semi-definite matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh(sigma)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2).

    The symmetric form: unlike a square root of S1 S2 it needs no complex numbers, no offset for singular
    covariances, and is computed by two symmetric eigenvalue problems in float64.

    Args:
        mu1: mean [d] of the first.
        sigma1: covariance [d, d] of the first.
        mu2: mean [d] of the second.
        sigma2: covariance [d, d] of the second.

    Returns:
        A number >= 0, in squared feature units.

    Raises:
        ValueError: shapes that do not fit.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule ...", NeurIPS 2017, eq. 6.
    """
    d = len(mu1)
    if mu2.shape != (d,) or sigma1.shape != (d, d) or sigma2.shape != (d, d):
        shapes = ", ".join(str(list(t.shape)) for t in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"Frechet distance of statistics that do not fit each other: {shapes}.")
    mu1, sigma1, mu2, sigma2 = (t.to("cpu", torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    return rooted_distance(mu1, sigma1, symmetric_sqrt(sigma1), mu2, sigma2)


def rooted_distance(mu1: Tensor, sigma1: Tensor, root1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """`frechet_distance` where the square root [d, d] of the first covariance is known, all float64."""
    cross = torch.linalg.eigvalsh(root1 @ sigma2 @ root1).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)  # equal inputs land on either side of zero by rounding


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
