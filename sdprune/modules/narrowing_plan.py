"""What is to be narrowed and how, before anything is pruned: resolved once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pipelines import DiffusersFamily
from sdprune.processes import Processes
from sdprune.pruning.narrowing import (
    NarrowReport,
    NarrowSpec,
    choose,
    groups_of,
    narrow,
    narrow_shapes,
    pair_name,
    pairing,
)
from sdprune.pruning.narrowing.engine import Units
from sdprune.pruning.statistics.removal_error import RemovalError

if TYPE_CHECKING:
    from sdprune.calibration.requests import Request
    from sdprune.modules.prompts import Requests
    from sdprune.modules.pruning_plan import CalibrationPlan


@dataclass(frozen=True)
class NarrowingPlan:
    """A narrowing that is resolved.

    Args:
        pipeline: the model.
        specs: of the components that are narrowed, by name.
        read: by component, the statistics that the choice of units reads, and those that refitting reads.
        choosing: all of the former.
        refitting: all of the latter; they are gathered when the choice is known.
    """

    pipeline: DiffusersFamily
    specs: Mapping[str, NarrowSpec]
    read: Mapping[str, tuple[list[Request], list[Request]]]
    choosing: CalibrationPlan
    refitting: CalibrationPlan

    def describe(self) -> dict[str, Any]:
        """What the narrowed weights depend on beside the model, as JSON: for identities; empty where nothing is."""
        if not self.specs:
            return {}
        return {
            "narrow": {name: spec.describe() for name, spec in sorted(self.specs.items())},
            "narrow_calibration": [one.facts for plan in (self.choosing, self.refitting) for one in plan.requests],
        }

    def meta_module(self, name: str) -> nn.Module:
        """A component on the meta device, in the shapes that it will have; it is dense where measurement decides these,
        until it has."""
        module = self.pipeline.meta_module(name)
        if name in self.specs and not (self.specs[name].flops and self.choosing.missing):
            with _naming(name):
                narrow_shapes(module, self.specs[name], self._stored(name, 0).get(RemovalError.name))
        return module

    def choose(self) -> dict[str, Units]:
        """By component, the units that stay, with statistics from the store; the pipeline is dense.

        Raises:
            InputError: measurement is to remove more than it can.
        """
        for name in self.specs:
            self.meta_module(name)
        found = {
            name: choose(self.pipeline.bring(name), spec, self._stored(name, 0)) for name, spec in self.specs.items()
        }
        for own, of_first in zip(found.values(), Processes().broadcast(found).values(), strict=True):
            if any(not torch.equal(own[name], units) for name, units in of_first.items()):
                raise RuntimeError("Processes chose different units.")
        return found

    @contextmanager
    def pairing(self, units: Mapping[str, Units]) -> Iterator[None]:
        """Let the dense components show what the narrowed layers will read."""
        with ExitStack() as stack:
            for name, spec in self.specs.items():
                if spec.refit:
                    module = self.pipeline.components[name]
                    stack.enter_context(pairing(module, groups_of(module, spec), units[name]))
            yield

    def apply(self, units: Mapping[str, Units]) -> dict[str, NarrowReport]:
        """Narrow every component of the loaded pipeline in place."""
        self.pipeline.altered = self.pipeline.altered or bool(self.specs)
        return {
            name: narrow(self.pipeline.bring(name), spec, units[name], self._stored(name, 1).get("hessian"))
            for name, spec in self.specs.items()
        }

    def _stored(self, name: str, part: int) -> dict[str, Mapping[str, Tensor]]:
        return {one.statistic: self.choosing.store.load(one.facts) for one in self.read[name][part]}


@contextmanager
def _naming(component: str) -> Iterator[None]:
    """Name the option of a component that an error begins with as a whole."""
    try:
        yield
    except InputError as error:
        raise InputError(f"--model.narrow.{component}.{error}") from error


def narrowing_requests(
    pipeline: DiffusersFamily, specs: Mapping[str, NarrowSpec], requests: Requests
) -> dict[str, tuple[list[Request], list[Request]]]:
    """By component, what the choice of units reads, and what refitting reads.

    Raises:
        InputError: a kind that a component does not have.
    """
    found = {}
    for name, spec in specs.items():
        with _naming(name):
            groups = groups_of(pipeline.meta_module(name), spec)
        parts = [(group, part) for group in groups for part in group.inputs]
        readers = [group.path(part) for group, part in parts]
        choice = requests.of_layers(name, spec.statistics, spec.timesteps, readers)
        choice += requests.of_removal(name, spec, readers, choice)
        pairs = [pair_name(group, part) for group, part in parts]
        chosen = {"narrow": spec.describe(), "reads": [one.facts for one in choice]}
        found[name] = (
            choice,
            requests.of_layers(name, ["hessian"], spec.timesteps, pairs, chosen) if spec.refit else [],
        )
    return found
