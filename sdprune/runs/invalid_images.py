"""What is kept of every drawn image's file: whether it is invalid, and its digest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdprune.metrics import PerImageRows
from sdprune.runs.png import Picture


class InvalidImages(PerImageRows):
    """Which images are wholly black, which came out of numbers that are not finite, and the digests of their files."""

    def __init__(self) -> None:
        super().__init__(("images.black", "images.not_finite", "images.digest"))

    def update(self, images: Tensor, pictures: Sequence[Picture], positions: Sequence[int]) -> None:
        """Add images, uint8 [b, 3, h, w], with the files that they were read from."""
        black = images.flatten(1).amax(1) == 0
        finite, digests = ([getattr(one, name) for one in pictures] for name in ("finite", "digest"))
        values = (black, ~torch.tensor(finite), torch.tensor(digests))
        self.append(positions, dict(zip(self.keys, values, strict=True)))

    def compute(self) -> dict[str, int]:
        """How many went wrong in each way; gathers."""
        rows = self.rows()
        return {name: int(rows[f"images.{name}"].sum()) for name in ("black", "not_finite")}

    def summary(self, ids: Sequence[Any]) -> dict[str, Any]:
        """For the record: how many there are, and the ids of the first hundred."""
        rows = self.rows()
        either = (rows["images.black"] | rows["images.not_finite"]).nonzero().flatten().tolist()
        return {**self.compute(), "invalid": [ids[place] for place in either[:100]]}
