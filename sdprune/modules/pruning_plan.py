"""What is to be pruned and how: resolved once, before anything is loaded, and passed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

from sdprune.calibration.collect import Collector, Request
from sdprune.calibration.progress import CalibrationState
from sdprune.calibration.prompts import PromptSubject, Requests
from sdprune.calibration.settings import Calibration
from sdprune.calibration.store import StatisticsStore
from sdprune.errors import InputError
from sdprune.identity import DRAWING, facts_of, package_code
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.processes import Processes
from sdprune.pruning import Budget, PruneReport, PruneSpec, Size, account, apply, targets_of
from sdprune.pruning.spec import AGREEMENT

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


@dataclass(frozen=True)
class CalibrationPlan:
    """The statistics that a run needs, in its store.

    Args:
        subjects: the components, by name.
        requests: the statistics.
        store: where they are kept.
        calibration: what counts, and the memory.
    """

    subjects: Mapping[str, PromptSubject]
    requests: tuple[Request, ...]
    store: StatisticsStore
    calibration: Calibration

    @property
    def missing(self) -> list[Request]:
        """The statistics that the store lacks."""
        return [request for request in self.requests if request.facts not in self.store]

    def check(self, data: CocoDataModule) -> None:
        """Raise InputError for too few captions, or a store that cannot be written."""
        if self.requests:
            _ = data.calibration_examples
        self.store.check(request.facts for request in self.requests)

    def collector(self, data: CocoDataModule, report: Callable[[CalibrationState], None]) -> Collector:
        """Gathers what is missing; the pipeline is loaded."""
        return Collector(
            self.subjects, self.requests, self.store, self.calibration.memory, Processes(), report, data.calibration_n
        )


@dataclass(frozen=True)
class PruningPlan:
    """A pruning that is resolved: every component's specification, and the statistics that it needs.

    Args:
        pipeline: the model.
        specs: of the components that are pruned, by name.
        requests: by component, the statistics of its allocation and of its criterion.
        calibration: all of these.
        budget: that the specifications come from, if there is one.
    """

    pipeline: DiffusersFamily
    specs: Mapping[str, PruneSpec]
    requests: Mapping[str, tuple[list[Request], list[Request]]]
    calibration: CalibrationPlan
    budget: Optional[Budget] = None

    def describe(self) -> dict[str, Any]:
        """What the pruned weights depend on beside the model, as JSON: for identities."""
        return {
            "prune": {name: spec.describe() for name, spec in sorted(self.specs.items())},
            "calibration": [request.facts for request in self.calibration.requests],
        }

    def check(self, data: CocoDataModule) -> None:
        """Everything that can be found wrong before the model is loaded: layer patterns, captions, the store."""
        for name, spec in self.specs.items():
            targets_of(self.pipeline.meta_module(name), spec)
        self.calibration.check(data)

    def apply(self) -> dict[str, PruneReport]:
        """Prune every component of the loaded pipeline in place, with statistics from the store."""
        store, reports = self.calibration.store, {}
        for name, (allocation, criterion) in self.requests.items():
            dense = {one.statistic: store.load(one.facts) for one in allocation}
            own = {one.statistic: store.load(one.facts) for one in criterion}
            reports[name] = apply(self.pipeline.components[name], self.specs[name], own, dense)
        hashes = Processes().all_gather({name: report.mask_hash for name, report in reports.items()})
        if any(one != hashes[0] for one in hashes):
            raise RuntimeError(f"Processes made different masks: {hashes}.")
        return reports

    def account(self, reports: Mapping[str, PruneReport]) -> dict[str, Any]:
        """Asked and achieved sparsities of the pipeline as it is now."""
        return account(self.pipeline.components, reports, list(self.pipeline.prunable))


@dataclass(frozen=True)
class PruningOptions:
    """What is to be pruned and how, as it was configured.

    Args:
        pipeline: the model.
        prune: by component; components at sparsity 0 stay dense.
        sampling: how images are drawn in calibration.
        calibration: what counts there.
        seed: of the calibration's noise.
        store: where statistics are kept.
        budget: decides the components' sparsities, if given; those of `prune` then are 0 or agree with it.
    """

    pipeline: DiffusersFamily
    prune: Mapping[str, PruneSpec]
    sampling: Sampling
    calibration: Calibration
    seed: int
    store: str
    budget: Optional[Budget] = None

    @property
    def wanted(self) -> bool:
        """Whether anything is to be pruned; needs no look at the model."""
        return self.budget is not None or any(not spec.dense for spec in self.prune.values())

    @property
    def calibrates(self) -> bool:
        """Whether calibration captions have to be there; needs no look at the model."""
        specs = [spec for spec in self.prune.values() if not spec.dense or self.budget is not None]
        return any(spec.criterion.statistics or spec.allocation.statistics for spec in specs)

    def resolve(self, data: CocoDataModule, dtype: str) -> PruningPlan:
        """Decide everything that can be decided before the model is loaded.

        Args:
            data: has the calibration prompts.
            dtype: the trainer's precision.

        Raises:
            InfeasibleError: the budget cannot be met.
            InputError: an unknown component, a scheduler that does not fit, or a budget that gives a component another
                sparsity than its specification.
        """
        self.pipeline.require(list(self.prune))
        self.pipeline.check(self.sampling)
        specs = dict(self.prune) if self.budget is None else self._budgeted(self.budget)
        specs = {name: spec for name, spec in specs.items() if not spec.dense}
        requests = self.requests(data, dtype, any(spec.statistics for spec in specs.values()))
        needed = {
            name: (requests.of_allocation(name, spec), requests.of_criterion(name, spec))
            for name, spec in specs.items()
        }
        flat = tuple(one for pair in needed.values() for part in pair for one in part)
        calibration = CalibrationPlan(requests.subjects, flat, StatisticsStore(self.store), self.calibration)
        return PruningPlan(self.pipeline, specs, needed, calibration, self.budget)

    def requests(self, data: CocoDataModule, dtype: str, wanted: bool = True) -> Requests:
        """Writes requests for statistics; without any being wanted, captions need not be there."""
        subjects = {
            name: PromptSubject(component, self.sampling, self.seed, self.calibration)
            for name, component in self.pipeline.prunable.items()
        }
        facts = {"version": package_code(*DRAWING), "pipeline": facts_of(self.pipeline), "dtype": dtype}
        return Requests(subjects, facts | ({"prompts": data.describe_calibration()} if wanted else {}))

    def _budgeted(self, budget: Budget) -> dict[str, PruneSpec]:
        """All prunable components at the sparsities that the budget gives them."""
        components = self.pipeline.prunable
        specs = {name: self.prune.get(name, PruneSpec()) for name in components}
        sizes = {name: self._size(name, spec) for name, spec in specs.items()}
        text = [name for name, component in components.items() if component.role == "text"]
        sparsities = budget.sparsities(sizes, text)
        for name, spec in specs.items():
            if spec.nominal and abs(spec.nominal - sparsities[name]) > AGREEMENT:
                raise InputError(
                    f"budget.total {budget.total:g} gives {name} a sparsity of {sparsities[name]:g}, and prune.{name} "
                    f"has {spec.nominal:g} (granularity {spec.granularity}): give one of them. A sparsity of 0 leaves "
                    "it to the budget."
                )
        return {
            name: spec if spec.nominal else replace(spec, sparsity=sparsities[name]) for name, spec in specs.items()
        }

    def _size(self, name: str, spec: PruneSpec) -> Size:
        module = self.pipeline.meta_module(name)
        weights = sum(target.weight.numel() for target in targets_of(module, spec))
        return Size(sum(parameter.numel() for parameter in module.parameters()), weights)
