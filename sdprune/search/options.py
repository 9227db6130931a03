"""The options of a search, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sdprune.errors import InputError, as_share, unknown
from sdprune.metrics import Score
from sdprune.pruning import PruneSpec
from sdprune.search.search import Model


@dataclass(frozen=True)
class Levels:
    """The sparsities, or totals of a budget, that a search chooses from.

    Args:
        low: the lowest one.
        high: the highest one.
        step: from one to the next.
    """

    low: float = 0.05
    high: float = 0.8
    step: float = 0.025

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            as_share(f"levels.{name}", getattr(self, name))
        if not 0 < self.low <= self.high or not self.step > 0:
            raise InputError(
                f"levels.low, high and step are {self.low:g}, {self.high:g} and {self.step:g}: nothing lies between "
                "these; give shares above 0, as in 0.05, 0.8 and 0.025."
            )

    def values(self) -> list[float]:
        """All of them, ascending."""
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return [round(self.low + number * self.step, 6) for number in range(count)]


def number_of(score: Score, scored: str | None) -> tuple[str, bool]:
    """The number of each image that is tested, and whether more of it is better."""
    numbers = score.paired
    if not numbers:
        raise InputError(
            f"score is {type(score).__name__}, which gives no number for single images: choose one that does, such as "
            "CLIPScore."
        )
    if scored is None:
        scored = next(iter(numbers))
    if scored not in numbers:
        raise unknown("scored", scored, numbers)
    return scored, numbers[scored]


def check_spec(name: str, spec: PruneSpec) -> None:
    """Raise InputError for a component whose sparsity is not the search's to choose."""
    given = f"--model.prune.{name}"
    if spec.pattern:
        raise InputError(
            f"{given}.granularity is {spec.granularity}, which sets the sparsity: there is nothing to search."
        )
    if spec.band is not None:
        raise InputError(f"{given}.band cannot be searched: leave it out.")
    if spec.allocation.prunes:
        raise InputError(
            f"{given}.allocation is {type(spec.allocation).__name__}, which prunes layers at any sparsity, so that the "
            "model is never dense: choose another."
        )
    if spec.sparsity:
        raise InputError(
            f"{given}.sparsity is {spec.sparsity:g}, and the search chooses it: leave it out (=0), or narrow "
            "--model.levels; a model to be tested beside goes to --model.also."
        )


def check_path(path: Sequence[Model]) -> None:
    """Raise InputError for models that do not rise in sparsity."""
    for less, more in pairwise(path):
        names = {*less.sparsities, *more.sparsities}
        if less == more or any(less.sparsities.get(name, 0) > more.sparsities.get(name, 0) for name in names):
            raise InputError(f"path goes from {less} to {more}: give models of rising sparsity.")


def model_of(option: str, sparsities: Mapping[str, float]) -> Model:
    """The model of these sparsities by component; InputError where none is above 0."""
    found = {name: as_share(f"{option}.{name}", share) for name, share in sparsities.items()}
    if not any(found.values()):
        raise InputError(f"{option} is {dict(sparsities)}: give sparsities above 0, as in {{unet: 0.35}}.")
    return Model(found)
