"""What is to be narrowed and how, before anything is pruned: resolved once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pipelines import DiffusersFamily
from sdprune.pipelines.reduced import Table
from sdprune.processes import Processes
from sdprune.pruning.narrowing import (
    NarrowReport,
    NarrowSpec,
    choose,
    groups_of,
    layers_of,
    narrow,
    narrow_shapes,
    pair_name,
    pairing,
)
from sdprune.pruning.narrowing.engine import LAYERS, Units

if TYPE_CHECKING:
    from sdprune.calibration.requests import Request
    from sdprune.modules.calibration_plan import CalibrationPlan
    from sdprune.modules.prompts import Requests


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
        if name in self.specs and not (self.specs[name].measured and self.choosing.missing):
            with _naming(name):
                narrow_shapes(module, self.specs[name], self._stored(name, 0))
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


def narrowing_specs(pipeline: DiffusersFamily, narrow: Mapping[str, NarrowSpec]) -> dict[str, NarrowSpec]:
    """What is removed, by component, without the modules that no picture depends on.

    Raises:
        InputError: a kind that a component does not have, or tables of one schedule in it.
    """
    found = {name: spec for name, spec in narrow.items() if spec.removes}
    for name, spec in found.items():
        module = pipeline.meta_module(name)
        if any(isinstance(one, Table) for one in module.modules()):
            raise InputError(
                f"--model.narrow.{name} is given, and the {name} of {pipeline.name} has tables in place of layers: "
                "narrow the model that it was made from, and let sdprune lossless make tables of what comes out."
            )
        with _naming(name):
            groups = groups_of(module, spec)
        idle = pipeline.prunable[name].idle(LAYERS, module)
        idle = [one for one in idle if any(fnmatchcase(group.name, one) for group in groups)]
        found[name] = replace(spec, exclude=[*spec.exclude, *idle]) if idle else spec
    return found


def narrowing_requests(
    pipeline: DiffusersFamily, specs: Mapping[str, NarrowSpec], requests: Requests
) -> dict[str, tuple[list[Request], list[Request]]]:
    """By component, what the choice of units reads, and what refitting reads."""
    found = {}
    for name, spec in specs.items():
        module = pipeline.meta_module(name)
        groups, layers = groups_of(module, spec), [one.key for one in layers_of(module, spec)]
        parts = [(group, part) for group in groups for part in group.inputs]
        readers = [group.path(part) for group, part in parts]
        choice = requests.of_layers(name, spec.statistics if readers else (), spec.timesteps, readers)
        choice += requests.of_removal(name, spec, readers, choice)
        choice += requests.of_dropping(name, spec, layers)
        pairs = [pair_name(group, part) for group, part in parts]
        chosen = {"narrow": spec.describe(), "reads": [one.facts for one in choice]}
        found[name] = (
            choice,
            requests.of_layers(name, ["hessian"], spec.timesteps, pairs, chosen) if spec.refit and pairs else [],
        )
    return found
