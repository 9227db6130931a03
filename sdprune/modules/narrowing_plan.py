"""What is to be narrowed and how, before anything is pruned: resolved once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sdprune.errors import InputError
from sdprune.pipelines import DiffusersFamily
from sdprune.processes import Processes
from sdprune.pruning.narrowing import NarrowReport, NarrowSpec, narrow, narrow_shapes
from sdprune.pruning.narrowing.engine import groups_of

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
        requests: by component, statistics of the layers that read what may be removed.
        calibration: all of these.
    """

    pipeline: DiffusersFamily
    specs: Mapping[str, NarrowSpec]
    requests: Mapping[str, list[Request]]
    calibration: CalibrationPlan

    def describe(self) -> dict[str, Any]:
        """What the narrowed weights depend on beside the model, as JSON: for identities; empty where nothing is."""
        if not self.specs:
            return {}
        return {
            "narrow": {name: spec.describe() for name, spec in sorted(self.specs.items())},
            "narrow_calibration": [request.facts for request in self.calibration.requests],
        }

    def meta_module(self, name: str) -> nn.Module:
        """A component on the meta device, in the shapes that it will have."""
        module = self.pipeline.meta_module(name)
        if name in self.specs:
            narrow_shapes(module, self.specs[name])
        return module

    def apply(self) -> dict[str, NarrowReport]:
        """Narrow every component of the loaded pipeline in place, with statistics from the store."""
        store, reports = self.calibration.store, {}
        self.pipeline.altered = self.pipeline.altered or bool(self.specs)
        for name, spec in self.specs.items():
            statistics = {one.statistic: store.load(one.facts) for one in self.requests[name]}
            reports[name] = narrow(self.pipeline.components[name], spec, statistics)
        hashes = Processes().all_gather({name: report.hash for name, report in reports.items()})
        if any(one != hashes[0] for one in hashes):
            raise RuntimeError(f"Processes kept different units: {hashes}.")
        return reports


def narrowing_requests(
    pipeline: DiffusersFamily, specs: Mapping[str, NarrowSpec], requests: Requests
) -> dict[str, list[Request]]:
    """By component, the statistics that narrowing reads: of the dense model, of the layers that read units.

    Raises:
        InputError: a kind that a component does not have.
    """
    found = {}
    for name, spec in specs.items():
        try:
            groups = groups_of(pipeline.meta_module(name), spec)
        except InputError as error:
            raise InputError(f"--model.narrow.{name}.{error}") from error
        readers = [one.layer for group in groups for one in group.inputs]
        found[name] = requests.of_layers(name, spec.statistics, spec.timesteps, readers)
    return found
