"""What the processes of a run hand to each other; in a run of one process everything stays where it is."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from lightning import Trainer


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
        if dist.get_backend() == "nccl":  # sends what lies on a GPU alone; weights that are offloaded do not
            value = value.to(torch.device("cuda", torch.cuda.current_device()))
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


def announce_machines(trainer: Trainer) -> None:
    """Print what a run on several machines waits for: it is silent until all of its processes have met."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or trainer.num_nodes < 2 or environment.local_rank() != 0:
        return
    where = f"{environment.main_address}:{environment.main_port}"
    number = environment.node_rank()
    line = f"Waiting for {trainer.world_size} processes on {trainer.num_nodes} machines to meet at {where}."
    if not environment.creates_processes_externally and number == 0:
        line += (
            " Start the same command on each other machine with MASTER_ADDR=(this machine) "
            f"MASTER_PORT={environment.main_port} NODE_RANK=1 and so on, or use torchrun or srun on all of them."
        )
    print(line, flush=True)


def report_lost_processes() -> None:
    """Print it when a process of the run dies: Lightning stops the others, and writes that into its log only."""

    class Printer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "terminated with code" in record.getMessage():
                line = "a process of this run has died, the others are stopped; run the same command again to go on"
                print(f"sdprune: failed: {line}", file=sys.stderr, flush=True)

    logger = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    logger.handlers, logger.propagate = [Printer()], False
    logger.setLevel(logging.INFO)


def leave_group() -> None:
    """Destroy the process group: torch may abort a process that ends without doing so."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
