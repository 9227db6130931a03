"""N of every M neighbouring inputs."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.granularity.base import ColumnWise, Granularity, Quota
from sdprune.pruning.selection import column_blocks, select_pattern
from sdprune.pruning.targets import Target


@dataclass(frozen=True)
class Pattern(ColumnWise):
    """N pruned of every M neighbouring channels, at each position of a kernel; a remainder stays dense.

    Args:
        n: how many are pruned.
        m: of how many.
        lowest: selects the n lowest of every group of the scores [..., m] of the layer so named.
    """

    n: int
    m: int
    lowest: Callable[[str, Tensor, int], Tensor] = select_pattern

    name = "N:M"

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            n, m = self.n, self.m
            raise InputError(f"granularity {n}:{m} prunes {n} of every {m}: give 1 to {m} of {m}.")

    @classmethod
    def read(cls, text: str, block_width: int) -> Optional[Granularity]:  # noqa: D102
        if text == cls.name:
            raise InputError("granularity N:M wants numbers, as in 2:4: 2 pruned of every 4 neighbouring inputs.")
        numbers = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(numbers[1]), int(numbers[2])) if numbers else None

    @property
    def sparsity(self) -> float:  # type: ignore[override]  # noqa: D102
        return self.n / self.m

    def mask(self, target: Target, scores: Tensor, quota: Quota) -> Tensor:  # noqa: D102
        mask = torch.zeros_like(scores, dtype=torch.bool)
        self._groups(target, mask).copy_(self.lowest(target.name, self._groups(target, scores), self.n))
        return mask

    def _groups(self, target: Target, matrix: Tensor) -> Tensor:
        """A view [rows, positions, groups, m] of a matrix."""
        groups = target.channels // self.m
        by_position = matrix.unflatten(1, (target.channels, -1)).transpose(1, 2)
        return by_position[..., : groups * self.m].unflatten(2, (groups, self.m))

    def order(self, target: Target) -> Tensor:  # noqa: D102
        return target.channels_last

    def widths(self, target: Target) -> list[int]:  # noqa: D102
        return column_blocks(target.channels, self.m) * (target.shape[1] // target.channels)

    def pick(self, name: str, scores: Tensor, k: int) -> Tensor:  # noqa: D102
        if scores.shape[1] < self.m:
            return torch.zeros_like(scores, dtype=torch.bool)
        return self.lowest(name, scores, self.n)
