"""What the processes of a run hand to each other; in a run of one process everything stays where it is."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of a run; every method but `rank`, `world_size` and `is_first` is collective.

    Args:
        alone: this process is on its own, whatever others there are.
    """

    def __init__(self, alone: bool = False) -> None:
        self.alone = alone

    @property
    def _together(self) -> bool:
        return not self.alone and dist.is_available() and dist.is_initialized()

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return dist.get_rank() if self._together else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if self._together else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """A small value of every process, in order of rank."""
        if not self._together:
            return [value]
        values: list[Optional[Any]] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value."""
        if not self._together:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every process's tensor, on the first process; nothing on the others."""
        if not self._together:
            return [value]
        if not self.is_first:
            dist.gather(value)
            return []
        values = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.gather(value, values)
        return values

    def barrier(self) -> None:
        """Wait for all."""
        if self._together:
            dist.barrier()
