"""Pruning with a second-order update of the weights that stay."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.criteria.base import Pick, Reconstruction

_LAZY = 128  # columns
_ESCALATIONS = 6  # a damping of ten thousand mean diagonals leaves nothing of H


class SparseGPT(Reconstruction):
    """W_ij^2 / diag(U)_j^2, U the upper Cholesky factor of H^-1 (Frantar & Alistarh 2023, eqs. 3 and 4, Algorithm 1).

    Columns go from first to last; the error that pruning one of them makes is spread over those after it. Weights of
    inputs that are always 0 (dead columns) score 0, count like any other and keep their bits unless they are pruned.
    The published code zeroes them all, beyond its count: so does mode original, and notes `dead_columns`.

    Args:
        damping: added to the diagonal of H, as a share of its mean. Where H still cannot be factorised it is raised
            tenfold until it can, which the report tells.
    """

    statistics = frozenset({"hessian"})
    granularities = ("column_block", "N:M")

    def __init__(self, damping: float = 0.01) -> None:
        if not damping >= 0:
            raise InputError(f"damping is {damping}: give a share of the mean diagonal, as in 0.01.")
        self.damping = damping

    def reconstruct(  # noqa: D102
        self, weight: Tensor, statistics: Mapping[str, Tensor], pick: Pick, widths: list[int], original: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        hessian = statistics["hessian"]
        if hessian.shape != (weight.shape[1], weight.shape[1]):
            raise InputError(
                f"Statistic hessian has shape {list(hessian.shape)} for a weight of shape {list(weight.shape)}: "
                "it belongs to another model; gather it again."
            )
        hessian = hessian.to(weight.device, torch.float32, copy=True)
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        dense, weight = weight, weight.to(torch.float32, copy=True)
        weight[:, dead] = 0  # they score 0, and have no error to spread
        factor, damping = _factor(hessian, self.damping)
        del hessian
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        for stretches in _blocks(widths):
            start, stop = stretches[0][0], stretches[-1][1]
            errors = torch.empty_like(weight[:, start:stop])
            for first, last in stretches:
                scores = (weight[:, first:last] / factor.diagonal()[first:last]).square()
                mask[:, first:last] = pick(scores, first, last)
                for j in range(first, last):
                    errors[:, j - start] = torch.where(mask[:, j], weight[:, j] / factor[j, j], 0)
                    weight[:, j:stop] -= errors[:, j - start, None] * factor[j, j:stop]
            weight[:, stop:] -= errors @ factor[start:stop, stop:]
        notes = {"damping": damping} if damping != self.damping else {}
        if original and dead.any():
            mask[:, dead] = True
            notes["dead_columns"] = int(dead.sum())
        return mask, torch.where(dead, dense, weight).masked_fill_(mask, 0), notes


def _blocks(widths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Neighbouring stretches (start, stop), as many as make up the columns whose errors later ones get at once."""
    stop, block = 0, []
    for width in widths:
        start, stop = stop, stop + width
        block.append((start, stop))
        if stop - block[0][0] >= _LAZY:
            yield block
            block = []
    if block:
        yield block


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped inverse, and the damping that it took."""
    mean = hessian.diagonal().mean()
    original = hessian.diagonal().clone()
    for _ in range(_ESCALATIONS):
        hessian.diagonal().copy_(original + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper, damping
        damping = max(damping * 10, 1e-4)
    raise InputError(
        "A Hessian cannot be factorised at any damping: check the weights and the calibration statistics for NaN."
    )
