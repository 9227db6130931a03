"""Rows of a layer."""

from torch import Tensor

from sdprune.pruning.granularity.base import Quota, WithinLayer
from sdprune.pruning.selection import select_rows
from sdprune.pruning.targets import Target


class Row(WithinLayer):
    """Each row, the weights of one output."""

    name = "row"

    def mask(self, target: Target, scores: Tensor, quota: Quota) -> Tensor:  # noqa: D102
        rows, columns = target.shape
        return select_rows(target.name, scores, *quota.ranks([columns] * rows))
