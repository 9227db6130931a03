"""Which prompts go together: a draw, cut into fixed batches, dealt to processes.

Batch k holds the same prompts on any number of processes, because images are bit-identical only at a fixed batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdprune.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

FILLER = -1


def draw(n_total: int, n: int, seed: int) -> np.ndarray:
    """Return `n` of `range(n_total)` without replacement, in drawn order: the study's draw (legacy NumPy generator).

    Raises:
        InputError: `n` exceeds `n_total`.
    """
    require_images(n_total, n, "n")
    return np.random.RandomState(seed).choice(n_total, n, replace=False)


def require_images(n_total: int, n: int, option: str) -> None:
    """Raise InputError, which names the option, when `n` captions are requested of `n_total`."""
    if n > n_total:
        raise InputError(f"{option}={n} is more than its source has: ask for at most {n_total}.")


@dataclass
class Batch:
    """Prompts that go through the model together. All lists have one length, padding included; a filler's are empty.

    Attributes:
        index: Number of the batch in the whole run, -1 for a filler.
        positions: Places in the drawn order.
        ids: Image ids.
        prompts: Captions.
        file_names: Names of the images.
        valid: How many entries count; those after it repeat the last prompt, to keep the batch size fixed.
    """

    index: int
    positions: list[int]
    ids: list[Any]
    prompts: list[str]
    file_names: list[str]
    valid: int


class Batches:
    """The fixed batches of a table, by number; number -1 is an empty filler. Serves as a map-style dataset.

    Args:
        rows: A table with `id`, `caption` and `file_name`, in drawn order.
        batch_size: Prompts a batch; the last one is padded to it.
    """

    def __init__(self, rows: "Dataset", batch_size: int) -> None:
        self.rows = rows
        self.batch_size = batch_size

    def __len__(self) -> int:
        return count_batches(len(self.rows), self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if index == FILLER:
            return Batch(FILLER, [], [], [], [], valid=0)
        if not 0 <= index < len(self):
            raise IndexError(f"Batch {index} of {len(self)}.")
        start = index * self.batch_size
        last = len(self.rows) - 1
        positions = [min(position, last) for position in range(start, start + self.batch_size)]
        rows = self.rows[positions]
        valid = min(self.batch_size, len(self.rows) - start)
        return Batch(index, positions, rows["id"], rows["caption"], rows["file_name"], valid)


class BatchSampler:
    """The batch numbers of one process: rank, rank + world_size, ...

    Args:
        n: Number of prompts.
        batch_size: Prompts a batch.
        rank: This process.
        world_size: Number of processes.
        fill: Give every process the same number of batches, at least one, by adding fillers (-1). Training loops
            deadlock on unequal numbers.

    Raises:
        InputError: Without `fill`, some process would get no batch.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1, fill: bool = False) -> None:
        batches = count_batches(n, batch_size)
        if not fill and world_size > batches:
            raise InputError(_too_many_processes(n, batch_size, world_size))
        self.indices = list(range(rank, batches, world_size))
        if fill:
            most = max(1, -(-batches // world_size))
            self.indices += [FILLER] * (most - len(self.indices))

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def count_batches(n: int, batch_size: int) -> int:
    """Return how many batches hold `n` prompts, the last one perhaps padded."""
    return -(-n // batch_size)


def _too_many_processes(n: int, batch_size: int, world_size: int) -> str:
    message = (
        f"n={n} prompts at batch size {batch_size} make {count_batches(n, batch_size)} batches, "
        f"fewer than the {world_size} processes."
    )
    if n < world_size:
        return f"{message} Use at most {n} processes."
    return f"{message} Use a batch size of at most {max(1, (n - 1) // (world_size - 1))}, or fewer processes."
