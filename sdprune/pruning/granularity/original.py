"""The counting of published codes (mode original): at the sparsity of each layer, and with their ties."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.granularity.base import ColumnWise, Granularity, Quota
from sdprune.pruning.granularity.pattern import Pattern
from sdprune.pruning.granularity.row import Row
from sdprune.pruning.selection import find_cut, keys_of, select_rows
from sdprune.pruning.targets import Target


def as_published(exact: Any, sparsities: Mapping[str, float], owl: bool) -> Granularity:
    """What counts as the published code does where `exact` counts exactly, given the sparsity of each layer."""
    return replace(exact, lowest=_lowest) if isinstance(exact, Pattern) else _Published(exact, sparsities, owl)


@dataclass(frozen=True)
class _Published(ColumnWise):
    exact: Any
    sparsities: Mapping[str, float]
    owl: bool

    def mask(self, target: Target, scores: Tensor, quota: Quota) -> Tensor:
        """Wanda: so many of every row. Magnitude: one threshold a layer, ties included."""
        sparsity, (rows, columns) = self.sparsities[target.name], scores.shape
        if isinstance(self.exact, Row):
            return select_rows(target.name, scores, [0] * rows, [int(columns * sparsity)] * rows)
        # Plain magnitude indexes with k - 1, so that k = 0 wraps round to the last; with OWL it is k.
        return _up_to(target.name, scores, int(scores.numel() * sparsity) - (not self.owl))

    def widths(self, target: Target) -> list[int]:
        return list(self.exact.widths(target))

    def pick(self, name: str, scores: Tensor, k: int) -> Tensor:
        """SparseGPT: one threshold a block, ties included."""
        return _up_to(name, scores, int(scores.numel() * self.sparsities[name]))


def _lowest(name: str, scores: Tensor, n: int) -> Tensor:
    """The n lowest of every group of the scores [..., m], with the ties of torch.topk."""
    keys_of(name, scores)
    lowest = scores.float().topk(n, dim=-1, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lowest, True)


def _up_to(name: str, scores: Tensor, rank: int) -> Tensor:
    """Every score up to the one of that rank, ties included; a negative rank counts from the end, as an index does."""
    keys = keys_of(name, scores).reshape(-1)
    if rank >= len(keys):  # where those codes fail
        raise InputError(f"mode original: layer {name!r} has no score of rank {rank}. Use mode exact.")
    cut = find_cut([lambda: keys], rank % len(keys) + 1)
    return (keys < cut.key + (cut.ties > 0)).view(scores.shape)
