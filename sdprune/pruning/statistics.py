"""What criteria need to know of a layer's inputs.

Gathered batch by batch and merged in batch order, they come out to the same bits on any number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.targets import Target


class InputNorms:
    """The statistic `input_norm`: for each input column j of a Linear, the sum of x_j^2 over all positions.

    Positions are the batch and everything else but the last dimension. Set `batch_size` and `valid` before a batch that
    ends in filler items.
    """

    name = "input_norm"

    def __init__(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if not isinstance(target.module, nn.Linear):
                raise InputError(
                    f"Layer {target.name!r} is a {target.kind}: input norms of Conv2d come in a later version; "
                    "prune Linear layers only, or use the criterion Magnitude."
                )
        self.targets = list(targets)
        self.batch_size: Optional[int] = None
        """Items of a batch. Under classifier-free guidance a U-Net sees them twice over: [all items, all items]."""
        self.valid: Optional[int] = None
        """How many of the batch's items count, the first ones; None means all."""
        self._sums: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """The sums since the last take, by layer name, float64 [columns] on the layer's device; starts again from 0."""
        sums, self._sums = self._sums, {}
        return sums

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Start to listen: one hook a layer, to be removed by the caller."""
        return [
            target.module.register_forward_pre_hook(partial(self._add, target.name), with_kwargs=True)
            for target in self.targets
        ]

    @torch.no_grad()
    def _add(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self._counted(name, args[0] if args else kwargs["input"])
        # In fp64 a square of fp32 is exact, and millions of positions add up without loss.
        sums = inputs.reshape(-1, inputs.shape[-1]).float().double().square_().sum(0)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _counted(self, name: str, inputs: Tensor) -> Tensor:
        if self.valid is None:
            return inputs
        if not self.batch_size or len(inputs) % self.batch_size:
            raise InputError(
                f"Layer {name!r} sees {len(inputs)} items, no multiple of batch_size {self.batch_size}: "
                "set batch_size beside valid, or choose batches that need no filler."
            )
        return inputs.unflatten(0, (-1, self.batch_size))[:, : self.valid]


@contextmanager
def gather(targets: Sequence[Target]) -> Iterator[InputNorms]:
    """Listen to the inputs of the targets while their component runs inside this context.

    Raises:
        InputError: for a target that is no Linear.
    """
    norms = InputNorms(targets)
    handles = norms.attach()
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def merge(partials: Mapping[int, Mapping[str, Tensor]], samples: int) -> dict[str, Tensor]:
    """The squared input norms per sample that Wanda's running statistic ends with.

    Args:
        partials: the sums of each batch, by batch index, then by layer name, float64 [columns]; from any process, in
            any order: they are added up in the order of the batch index.
        samples: how many samples (not tokens) the batches hold together.

    Returns:
        By layer name, float32 [columns].
    """
    if samples < 1:
        raise InputError(f"Statistics of {samples} samples: calibrate with at least one.")
    sums: dict[str, Tensor] = {}
    for index in sorted(partials):
        for name, partial_sum in partials[index].items():
            sums[name] = sums[name] + partial_sum if name in sums else partial_sum.clone()
    return {name: (total / samples).float() for name, total in sums.items()}
