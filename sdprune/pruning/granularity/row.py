"""Rows of a layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdprune.pruning.granularity.base import Granularity, Quota
from sdprune.pruning.selection import Layer, select_rows


class Row(Granularity):
    """Each row, the weights of one output."""

    name = "row"

    def masks(self, layers: Sequence[Layer], quota: Quota) -> Iterator[Tensor]:  # noqa: D102
        return (_mask(layer, quota) for layer in layers)


def _mask(layer: Layer, quota: Quota) -> Tensor:
    """The mask of a layer, of which some rows are looked at at a time."""
    rows, columns = layer.target.shape
    low, high = quota.ranks([columns] * rows)
    mask = torch.empty(layer.target.shape, dtype=torch.bool, device=layer.target.weight.device)
    start = 0
    for part in layer.parts:
        scores = part()
        stop = start + len(scores)
        mask[start:stop] = select_rows(layer.target.name, scores, low[start:stop], high[start:stop])
        start = stop
    return mask
