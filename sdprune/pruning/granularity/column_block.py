"""Blocks of columns of a layer."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from sdprune.pruning.granularity.base import ColumnWise, Granularity, Quota
from sdprune.pruning.selection import column_blocks, select_rows
from sdprune.pruning.targets import Target


@dataclass(frozen=True)
class ColumnBlock(ColumnWise):
    """Each block of so many columns; the last may be narrower."""

    block_width: int

    name = "column_block"

    @classmethod
    def read(cls, text: str, block_width: int) -> Optional[Granularity]:  # noqa: D102
        return cls(block_width) if text == cls.name else None

    def mask(self, target: Target, scores: Tensor, quota: Quota) -> Tensor:  # noqa: D102
        blocks = scores.split(self.block_width, 1)
        ranks = zip(blocks, *quota.ranks([block.numel() for block in blocks]), strict=True)
        return torch.cat([_select(target.name, block, low, high) for block, low, high in ranks], 1)

    def widths(self, target: Target) -> list[int]:  # noqa: D102
        return column_blocks(target.shape[1], self.block_width)

    def pick(self, name: str, scores: Tensor, k: int) -> Tensor:  # noqa: D102
        return _select(name, scores, 0, k)


def _select(name: str, block: Tensor, low: int, high: int) -> Tensor:
    return select_rows(name, block.reshape(1, -1), [low], [high]).view(block.shape)
