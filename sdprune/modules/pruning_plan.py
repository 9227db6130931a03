"""A pruning that is resolved: made once, before anything is loaded, and passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor, nn

from sdprune.calibration.execution import order_of_calls
from sdprune.calibration.requests import Request
from sdprune.identity import DRAWING, facts_of, package_code
from sdprune.modules.calibration_plan import CalibrationPlan
from sdprune.modules.narrowing_plan import NarrowingPlan
from sdprune.pipelines import DiffusersFamily
from sdprune.processes import Processes
from sdprune.pruning import Budget, PruneReport, PruneSpec, Size, account, apply, targets_of
from sdprune.pruning.allocation.sensitivity import Sensitivity, units_of
from sdprune.pruning.budget import Split
from sdprune.pruning.statistics.pruned_error import PrunedError
from sdprune.runs.label import label

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


@dataclass(frozen=True)
class PruningPlan:
    """A pruning that is resolved: every component's specification, and the statistics that it needs.

    Args:
        pipeline: the model.
        dtype: the trainer's precision, which decides that of the weights.
        specs: of the components that are pruned, by name.
        requests: by component, the statistics of its allocation and of its criterion.
        calibration: all of these.
        narrowing: what is removed before.
        budget: that the specifications come from, if there is one.
    """

    pipeline: DiffusersFamily
    dtype: str
    specs: Mapping[str, PruneSpec]
    requests: Mapping[str, tuple[list[Request], list[Request]]]
    calibration: CalibrationPlan
    narrowing: NarrowingPlan
    budget: Optional[Budget] = None

    @property
    def measured(self) -> Optional[Budget]:
        """The budget, if it is shared out by measurement: then the specifications' sparsities are its total, and those
        that are applied are known after calibration, see `split`."""
        return self.budget if self.budget is not None and self.budget.measured else None

    def describe(self) -> dict[str, Any]:
        """What the pruned weights depend on, as JSON: for identities."""
        shared = {} if self.measured is None else {"sparsity": None, "budget": self.measured.describe()}
        return {
            **model_facts(self.pipeline, self.dtype),
            "prune": {name: {**spec.describe(), **shared} for name, spec in sorted(self.specs.items())},
            "calibration": [request.facts for request in self.calibration.requests],
            **self.narrowing.describe(),
        }

    def label(self, unpruned: str = "dense") -> str:
        """What is pruned and how, for names of directories."""
        total = None if self.measured is None else self.measured.total
        return label(self.specs, unpruned, total, self.narrowing.specs)

    def check(self, data: CocoDataModule) -> None:
        """Everything that can be found wrong before the model is loaded: layer patterns, captions, the store."""
        for name, spec in self.specs.items():
            targets_of(self.narrowing.meta_module(name), spec)
        self.narrowing.choosing.check(data)
        self.narrowing.refitting.check(data)
        self.calibration.check(data)

    def apply(self) -> dict[str, PruneReport]:
        """Prune every component of the loaded pipeline in place, with statistics from the store."""
        store, reports, split = self.calibration.store, {}, self.split()
        self.pipeline.altered = self.pipeline.altered or bool(self.requests)
        for name, (allocation, criterion) in self.requests.items():
            dense = {one.statistic: store.load(one.facts) for one in allocation}
            own = {one.statistic: store.load(one.facts) for one in criterion}
            spec = self.specs[name] if split is None else replace(self.specs[name], sparsity=split.sparsities[name])
            order = self._order(name) if isinstance(spec.allocation, Sensitivity) else []
            reports[name] = apply(self.pipeline.bring(name), spec, own, dense)
            if isinstance(spec.allocation, Sensitivity):
                reports[name].sensitivity = self._sensitivity(name, spec.allocation, order, reports[name])
        hashes = Processes().all_gather({name: report.mask_hash for name, report in reports.items()})
        if any(one != hashes[0] for one in hashes):
            raise RuntimeError(f"Processes made different masks: {hashes}.")
        return reports

    def split(self) -> Optional[Split]:
        """How the budget is shared out by measurement, if it is, once the errors are in the store; needs no weights."""
        if self.measured is None or not self.specs:
            return None
        sizes, units = {}, []
        for name, spec in self.specs.items():
            assert isinstance(spec.allocation, Sensitivity)
            module = self.narrowing.meta_module(name)
            sizes[name] = size_of(module, spec)
            units += spec.allocation.units(targets_of(module, spec), self._errors(name), name)
        return self.measured.split_measured(sizes, units)

    def describe_budget(self) -> Optional[dict[str, Any]]:
        """The budget as records have it, with what measurement made of it; None without a budget."""
        if self.budget is None:
            return None
        split = self.split()
        found = {} if split is None else {"sparsities": split.sparsities, "path": [one._asdict() for one in split.path]}
        return {**self.budget.describe(), **found}

    def _errors(self, name: str) -> Mapping[str, Tensor]:
        """The measured errors of a component's layers."""
        (request,) = (one for one in self.requests[name][0] if one.statistic == PrunedError.name)
        return self.calibration.store.load(request.facts)

    def _order(self, name: str) -> list[str]:
        """In which order the layers of a component run."""
        subject = self.calibration.subjects[name]
        return order_of_calls(subject.module, targets_of(subject.module, self.specs[name]), subject.try_out)

    def _sensitivity(
        self, name: str, allocation: Sensitivity, order: Sequence[str], report: PruneReport
    ) -> dict[str, Any]:
        """What was measured of a component, for records: its units in the order in which they run."""
        errors, place = self._errors(name), {layer: number for number, layer in enumerate(order)}
        targets = targets_of(self.narrowing.meta_module(name), self.specs[name])
        lost = {layer.name: layer.pruned for layer in report.layers}
        units = sorted(
            units_of(targets, allocation.unit).items(),
            key=lambda unit: min(place.get(target.name, len(place)) for target in unit[1]),
        )
        found = [
            {
                "name": unit, "block": members[0].block, "weights": sum(one.weight.numel() for one in members),
                "pruned": sum(lost[one.name] for one in members), "errors": errors[members[0].name].tolist(),
            }
            for unit, members in units
        ]  # fmt: skip
        read_at = self.calibration.subjects[name].read_at(allocation.probe)
        return {"unit": allocation.unit, "read_at": read_at, "levels": allocation.levels, "units": found}

    def account(self, reports: Mapping[str, PruneReport]) -> dict[str, Any]:
        """Requested and achieved sparsities of the pipeline as it is now."""
        return account(self.pipeline.components, reports, list(self.pipeline.prunable))


def model_facts(pipeline: DiffusersFamily, dtype: str) -> dict[str, Any]:
    """Code, model and precision: what every statistic, mask and picture depends on."""
    return {"version": package_code(*DRAWING), "pipeline": facts_of(pipeline), "dtype": dtype}


def size_of(module: nn.Module, spec: PruneSpec) -> Size:
    """Parameters of a component, and those of them that a specification targets."""
    weights = sum(target.weight.numel() for target in targets_of(module, spec))
    return Size(sum(parameter.numel() for parameter in module.parameters()), weights)
