"""Images that went wrong: counted and told, never left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdprune.metrics import PerImageRows


class Flaws(PerImageRows):
    """Which images are wholly black, and which came out of numbers that are not finite."""

    columns = ("black", "not_finite")
    name = "images"

    def update(self, images: Tensor, finite: Sequence[bool], positions: Sequence[int]) -> None:
        """Add uint8 images [b, 3, h, w]."""
        self.append(positions, black=images.flatten(1).amax(1) == 0, not_finite=~torch.tensor(finite))

    def compute(self) -> dict[str, int]:
        """How many there are; gathers."""
        return {name: int(column.sum()) for name, column in self.rows().items()}

    def told(self, ids: Sequence[Any]) -> dict[str, Any]:
        """For the record: how many there are, and the ids of the first hundred."""
        rows = self.rows()
        either = (rows["black"] | rows["not_finite"]).nonzero().flatten().tolist()
        return {**self.compute(), "flawed": [ids[place] for place in either[:100]]}
