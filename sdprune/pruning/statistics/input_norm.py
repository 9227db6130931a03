"""Squared norms of a layer's inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdprune.pruning.statistics.base import InputStatistic
from sdprune.pruning.targets import Target
from sdprune.pruning.timesteps import Timesteps, timestep_weights

_CHUNK = 1 << 18  # input numbers squared at a time: their fp64 copies stay in cache


class InputNorm(InputStatistic):
    """`input_norm`: the sum of x_j^2 over all positions, by denoising step: float64 [steps, groups, columns].

    Divided by the number of samples it is what Wanda's running statistic ends with. As there, every call adds its
    samples to that number: a layer that is called k times in a step has the mean over its calls, not their sum, so that
    it can be ranked beside layers that are called once. Steps are kept apart and weighted when it is read.
    """

    name = "input_norm"

    def empty(self, target: Target) -> Tensor:  # noqa: D102
        columns = target.shape[1]
        return torch.zeros(self.steps, target.groups, columns, dtype=torch.float64, device=target.weight.device)

    def bytes_of(self, target: Target) -> int:  # noqa: D102
        return 8 * self.steps * target.groups * target.shape[1]

    def term(self, target: Target, inputs: Tensor) -> Tensor:  # noqa: D102
        # In fp64 a square of fp32 is exact, and millions of positions add up without loss.
        conv = target.kind == "Conv2d"
        flat = inputs.flatten(1) if conv else inputs.reshape(-1, inputs.shape[-1])
        sums = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
        for part in flat.split(max(1, _CHUNK // max(1, flat.shape[1]))):
            sums += part.to(torch.float64, copy=True).square_().sum(0)
        if not conv:
            return sums[None]
        # Unfolding only copies, so that it may follow the sum over items.
        return target.columns(sums.view(1, *inputs.shape[1:])).sum(1)

    def add(self, total: Tensor, term: Tensor, step: int) -> None:  # noqa: D102
        total[step] += term

    def average(self, total: Tensor, calls: Mapping[int, int]) -> None:  # noqa: D102
        for step, n in calls.items():
            if n > 1:
                total[step] /= n

    def finish(self, total: Tensor, samples: int) -> Tensor:  # noqa: D102
        return (total / samples).float()

    @classmethod
    def read(cls, layer: str, stored: Tensor, timesteps: Timesteps) -> Tensor:
        """The weighted mean over steps: float32 [groups, columns]."""
        cls.require_axes(layer, stored, "steps", "groups", "columns")
        weights = torch.tensor(timestep_weights(timesteps, len(stored)), dtype=torch.float64, device=stored.device)
        return ((weights[:, None, None] * stored.double()).sum(0) / weights.sum()).float()
