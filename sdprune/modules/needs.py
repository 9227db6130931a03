"""Which statistics a pruning needs, and what they depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Optional

from sdprune.errors import InputError
from sdprune.identity import facts_of, package_code
from sdprune.pipelines import PipelineFamily, Sampling
from sdprune.pruning import PruneSpec, Timesteps

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


@dataclass(frozen=True)
class Calibration:
    """What of the calibration runs counts, and the memory they may take.

    Args:
        padding: whether a text encoder's padding tokens count, as they do in the published codes.
        unconditional: weight of the half of a guided batch that runs without its prompts; the other half has 1.
        hessian_gib: memory in GiB for the Hessians gathered in one pass over the prompts; more make more passes.
    """

    padding: bool = True
    unconditional: float = 1.0
    hessian_gib: float = 8.0

    def __post_init__(self) -> None:
        if not self.unconditional >= 0:
            raise InputError(f"unconditional is {self.unconditional}: give a weight of 0 or more.")
        if not self.hessian_gib > 0:
            raise InputError(f"hessian_gib is {self.hessian_gib}: give the memory in GiB, as in 8.")


@dataclass(frozen=True)
class Need:
    """One statistic of one component, and the facts that decide its values."""

    component: str
    statistic: str
    layers: tuple[str, ...]
    timesteps: Timesteps
    facts: dict[str, Any]
    spec: Optional[PruneSpec] = None
    """In sequential order: how each block is pruned before the next one is looked at."""
    allocation: tuple[Need, ...] = ()
    """In sequential order: what the allocation of `spec` reads."""


class Needs:
    """Writes down what statistics depend on.

    Args:
        pipeline: the model.
        data: has the calibration prompts.
        sampling: how images are drawn.
        seed: of the noise.
        calibration: what counts.
        dtype: the trainer's precision.
    """

    def __init__(
        self, pipeline: PipelineFamily, data: CocoDataModule, sampling: Sampling, seed: int, calibration: Calibration,
        dtype: str,
    ):  # fmt: skip
        self.pipeline, self.data, self.sampling, self.seed = pipeline, data, sampling, seed
        self.calibration, self.dtype = calibration, dtype

    def of_model(self, component: str, name: str, layers: Iterable[str], timesteps: Timesteps) -> Need:
        """A statistic of the dense model."""
        kinds = tuple(sorted(set(layers)))
        facts = {"component": component, "statistic": name, "layers": list(kinds), **self._common(component)}
        if name == "hessian" and not is_text(component):
            facts["timesteps"] = timesteps
        return Need(component, name, kinds, timesteps, facts)

    def of_pruning(self, component: str, spec: PruneSpec) -> list[Need]:
        """What the criterion reads."""
        names = sorted(spec.criterion.statistics)
        needs = [self.of_model(component, name, spec.layers, spec.timesteps) for name in names]
        if not spec.sequential:
            return needs
        before = tuple(self.of_allocation(component, spec))
        facts = {"prune": spec.describe(), "allocation": [need.facts for need in before]}
        return [replace(need, facts=need.facts | facts, spec=spec, allocation=before) for need in needs]

    def of_allocation(self, component: str, spec: PruneSpec) -> list[Need]:
        """What the allocation reads."""
        names = sorted(spec.allocation.statistics)
        return [self.of_model(component, name, spec.layers, spec.timesteps) for name in names]

    @cached_property
    def _prompts(self) -> dict[str, Any]:
        return self.data.describe_calibration()  # may hash a large file

    def _common(self, component: str) -> dict[str, Any]:
        common = {"version": package_code(), "pipeline": facts_of(self.pipeline), "dtype": self.dtype}
        common["prompts"] = self._prompts
        if is_text(component):
            return common | {"padding": self.calibration.padding}
        drawn = {"sampling": self.sampling.describe(), "seed": self.seed}
        return common | drawn | {"unconditional": self.calibration.unconditional}


def is_text(component: str) -> bool:
    """Whether a component is a text encoder."""
    return component.startswith("text_encoder")
