"""Second moments of a layer's inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdprune.pruning.statistics.base import InputStatistic
from sdprune.pruning.targets import Target
from sdprune.pruning.timesteps import Timesteps, timestep_weights

_UNFOLDED = 1 << 24  # unfolded input numbers at a time: bounds what a convolution's Hessian takes beside itself


class Hessian(InputStatistic):
    """`hessian`: 2 * sum_i a_i X_i^T X_i / sum_i a_i over denoising steps i, float32 [groups, columns, columns].

    X_i are the inputs [positions, columns] of step i and a_i the step's weight; divided by the number of samples. Where
    a layer is called several times in a step, i runs over the calls, here and in the divisor.
    (Frantar & Alistarh 2023, SparseGPT; the weights are those of OBS-Diff, 2025.)
    """

    name = "hessian"
    by_timesteps = True

    def __init__(self, steps: int = 1, timesteps: Timesteps = "uniform") -> None:
        super().__init__(steps, timesteps)
        self.weights = timestep_weights(timesteps, steps)

    def empty(self, target: Target) -> Tensor:  # noqa: D102
        columns = target.shape[1]
        return torch.zeros(target.groups, columns, columns, dtype=torch.float32, device=target.weight.device)

    def bytes_of(self, target: Target) -> int:  # noqa: D102
        return 4 * target.groups * target.shape[1] ** 2

    def term(self, target: Target, inputs: Tensor) -> Tensor:  # noqa: D102
        total = self.empty(target)
        rows = inputs if target.kind == "Conv2d" else inputs.reshape(-1, inputs.shape[-1])
        per_row = max(1, target.columns(rows[:1]).numel()) if len(rows) else 1
        for part in rows.split(max(1, _UNFOLDED // per_row)):
            x = target.columns(part.float())
            total.baddbmm_(x.transpose(1, 2), x)
        return total

    def add(self, total: Tensor, term: Tensor, step: int) -> None:  # noqa: D102
        total.add_(term, alpha=self.weights[step])

    def average(self, total: Tensor, calls: Mapping[int, int]) -> None:  # noqa: D102
        once = sum(self.weights)
        counted = sum(weight * max(1, calls.get(step, 0)) for step, weight in enumerate(self.weights))
        if counted != once:
            total *= once / counted

    def finish(self, total: Tensor, samples: int) -> Tensor:  # noqa: D102
        return total * (2 / (samples * sum(self.weights)))

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:
        """What is stored: [groups, columns, columns]."""
        cls.require_axes(layer, stored, "groups", "columns", "columns")
        return stored
