"""Less sparsity where pruning changes the output more."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import List, get_args

from torch import Tensor

from sdprune.errors import InputError, as_share, unknown
from sdprune.pruning.allocation.base import Allocation, Norms, Share
from sdprune.pruning.error_path import ErrorPath, Unit
from sdprune.pruning.selection import count
from sdprune.pruning.statistics.pruned_error import Probe, ProbedUnit, ReadAt
from sdprune.pruning.targets import Target, by_block


class Sensitivity(Allocation):
    """Share the sparsity out by measurement: the sum of the units' errors becomes as small as it can be.

    Each layer, or each block, is pruned alone to a few sparsities, by the specification's criterion. The errors that
    this makes are raised where a unit adds more to those of the others in a pruned model (see `PrunedError`). They
    are interpolated between these sparsities, in logarithms of both, and taken to add up. The chosen sparsities have
    the smallest sum of errors at the overall sparsity (see `ErrorPath`). None exceeds the highest level, since what is
    not measured is not known: an overall sparsity from there on is uniform.

    Args:
        unit: layer or block: what is pruned alone, and gets a sparsity of its own.
        levels: sparsities that are measured, in (0, 1), ascending.
        samples: how many calibration prompts the error is measured on, the first ones.
        steps: at how many denoising steps; each prompt counts at one of them, in turn.
        read_at: output or prediction: whether the error is that of the component's own output, or of what the denoiser
            predicts from it, in which components compare. A denoiser's output is its guided prediction, a text
            encoder's the embeddings of the prompt and, guided, those of the empty prompt.
    """

    statistics = frozenset({"pruned_error"})

    def __init__(
        self, unit: ProbedUnit = "layer", levels: List[float] = [0.3, 0.5, 0.7, 0.85, 0.95],  # noqa: B006 (not changed)
        samples: int = 24, steps: int = 8, read_at: ReadAt = "output",
    ) -> None:  # fmt: skip
        for name, choice, choices in (("unit", unit, ProbedUnit), ("read_at", read_at, ReadAt)):
            if choice not in get_args(choices):
                raise unknown(name, choice, get_args(choices))
        shares = [as_share("levels", level) for level in levels]
        if len(shares) < 2 or shares != sorted(set(shares)) or not shares[0] > 0 or not shares[-1] < 1:
            raise InputError(f"levels is {levels}: give ascending shares between 0 and 1, as in [0.3, 0.7].")
        for name, value in (("samples", samples), ("steps", steps)):
            if value < 1:
                raise InputError(f"{name} is {value}: give 1 or more.")
        self.unit, self.levels, self.samples, self.steps, self.read_at = unit, shares, samples, steps, read_at
        self.probe: Probe = Probe(self.unit, tuple(self.levels), self.samples, self.steps, self.read_at)

    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> Mapping[str, Share]:  # noqa: D102
        if sparsity >= self.levels[-1]:
            return {target.name: sparsity for target in targets}
        path = ErrorPath(self.units(targets, statistics["pruned_error"]))
        counts = path.counts(count(sum(unit.size for unit in path.units), sparsity))
        shares = [Fraction(lost, unit.size) for unit, lost in zip(path.units, counts, strict=True)]
        parts = zip(units_of(targets, self.unit).values(), shares, strict=True)
        return {target.name: share for members, share in parts for target in members}

    def units(self, targets: Sequence[Target], errors: Mapping[str, Tensor], group: Hashable = None) -> list[Unit]:
        """What gets a sparsity of its own, with its errors, in the order of the targets.

        Args:
            targets: the layers; their sizes count.
            errors: the statistic `pruned_error`, by layer.
            group: what the units are counted with.
        """
        return [
            Unit(group, sum(target.weight.numel() for target in members), self.levels, errors[members[0].name].tolist())
            for members in units_of(targets, self.unit).values()
        ]


def units_of(targets: Sequence[Target], unit: ProbedUnit) -> dict[str, list[Target]]:
    """The layers that are pruned together, by the name of the layer or the block."""
    return by_block(targets) if unit == "block" else {target.name: [target] for target in targets}
