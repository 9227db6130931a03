"""What is to be pruned and how: resolved once, before anything is loaded, and passed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn

from sdprune.api import prune
from sdprune.calibration.collect import Collector
from sdprune.calibration.progress import CalibrationState
from sdprune.calibration.requests import Request
from sdprune.calibration.settings import Calibration
from sdprune.calibration.store import StatisticsStore
from sdprune.errors import InputError
from sdprune.identity import DRAWING, code_of, facts_of, package_code
from sdprune.modules.prompts import PromptSubject, Requests
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.processes import Processes
from sdprune.pruning import Budget, PruneReport, PruneSpec, Size, account, apply, targets_of
from sdprune.pruning.allocation.uniform import Uniform
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
            self.subjects,
            self.requests,
            self.store,
            self.calibration.memory,
            Processes(),
            report,
            data.calibration_n,
            data.calibration_batch,
        )


@dataclass(frozen=True)
class PruningPlan:
    """A pruning that is resolved: every component's specification, and the statistics that it needs.

    Args:
        pipeline: the model.
        dtype: the trainer's precision, which decides that of the weights.
        specs: of the components that are pruned, by name.
        requests: by component, the statistics of its allocation and of its criterion.
        calibration: all of these.
        budget: that the specifications come from, if there is one.
    """

    pipeline: DiffusersFamily
    dtype: str
    specs: Mapping[str, PruneSpec]
    requests: Mapping[str, tuple[list[Request], list[Request]]]
    calibration: CalibrationPlan
    budget: Optional[Budget] = None

    def describe(self) -> dict[str, Any]:
        """What the pruned weights depend on, as JSON: for identities."""
        return {
            **model_facts(self.pipeline, self.dtype),
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
        self.pipeline.altered = self.pipeline.altered or bool(self.requests)
        for name, (allocation, criterion) in self.requests.items():
            dense = {one.statistic: store.load(one.facts) for one in allocation}
            own = {one.statistic: store.load(one.facts) for one in criterion}
            reports[name] = apply(self.pipeline.components[name], self.specs[name], own, dense)
        hashes = Processes().all_gather({name: report.mask_hash for name, report in reports.items()})
        if any(one != hashes[0] for one in hashes):
            raise RuntimeError(f"Processes made different masks: {hashes}.")
        return reports

    def account(self, reports: Mapping[str, PruneReport]) -> dict[str, Any]:
        """Requested and achieved sparsities of the pipeline as it is now."""
        return account(self.pipeline.components, reports, list(self.pipeline.prunable))


@dataclass(frozen=True)
class PruningOptions:
    """What is to be pruned and how, as it was configured.

    Args:
        prune: by component; components at sparsity 0 stay dense.
        sampling: how images are drawn in calibration.
        calibration: what counts there.
        seed: of the calibration's noise.
        store: where statistics are kept.
        budget: decides the components' sparsities, if given; those of `prune` then are 0 or agree with it.
    """

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

    def resolve(self, pipeline: DiffusersFamily, data: CocoDataModule, dtype: str) -> PruningPlan:
        """Decide everything that can be decided before the model is loaded.

        Args:
            pipeline: the model.
            data: has the calibration prompts.
            dtype: the trainer's precision.

        Raises:
            InfeasibleError: the budget cannot be met.
            InputError: an unknown component, or a budget that gives a component another sparsity than its
                specification.
        """
        pipeline.require(list(self.prune))
        specs = dict(self.prune) if self.budget is None else self._budgeted(self.budget, pipeline)
        specs = {name: spec for name, spec in specs.items() if not spec.dense}
        for spec in specs.values():
            _try_out(spec)
        requests = self.requests(pipeline, data, dtype, any(spec.statistics for spec in specs.values()))
        needed = {
            name: (requests.of_allocation(name, spec), requests.of_criterion(name, spec))
            for name, spec in specs.items()
        }
        flat = tuple(one for pair in needed.values() for part in pair for one in part)
        calibration = CalibrationPlan(requests.subjects, flat, StatisticsStore(self.store), self.calibration)
        return PruningPlan(pipeline, dtype, specs, needed, calibration, self.budget)

    def requests(self, pipeline: DiffusersFamily, data: CocoDataModule, dtype: str, wanted: bool = True) -> Requests:
        """Writes requests for statistics; without any being wanted, captions need not be there."""
        subjects = {
            name: PromptSubject(component, self.sampling, self.seed, self.calibration)
            for name, component in pipeline.prunable.items()
        }
        facts = model_facts(pipeline, dtype)
        return Requests(subjects, facts | ({"prompts": data.describe_calibration()} if wanted else {}))

    def _budgeted(self, budget: Budget, pipeline: DiffusersFamily) -> dict[str, PruneSpec]:
        """All prunable components at the sparsities that the budget gives them."""
        components = pipeline.prunable
        specs = {name: self.prune.get(name, PruneSpec()) for name in components}
        sizes = {name: _size(pipeline.meta_module(name), spec) for name, spec in specs.items()}
        text = [name for name, component in components.items() if component.role == "text"]
        sparsities = budget.sparsities(sizes, text)
        requested = {
            name: spec.pattern[0] / spec.pattern[1] if spec.pattern else spec.nominal for name, spec in specs.items()
        }
        unlike = [name for name in specs if requested[name] and abs(requested[name] - sparsities[name]) > AGREEMENT]
        if unlike:
            conflicts = ", and ".join(
                f"{name} a sparsity of {sparsities[name]:g}, where --model.prune.{name} has {requested[name]:g}"
                for name in unlike
            )
            free = " ".join(f"--model.prune.{name}.{_without_sparsity(specs[name])}" for name in unlike)
            raise InputError(f"--model.budget.total={budget.total:g} gives {conflicts}. Leave it to the budget: {free}")
        return {
            name: spec if spec.nominal else replace(spec, sparsity=sparsities[name]) for name, spec in specs.items()
        }


def model_facts(pipeline: DiffusersFamily, dtype: str) -> dict[str, Any]:
    """Code, model and precision: what every statistic, mask and picture depends on."""
    return {"version": package_code(*DRAWING), "pipeline": facts_of(pipeline), "dtype": dtype}


def _size(module: nn.Module, spec: PruneSpec) -> Size:
    weights = sum(target.weight.numel() for target in targets_of(module, spec))
    return Size(sum(parameter.numel() for parameter in module.parameters()), weights)


def _without_sparsity(spec: PruneSpec) -> str:
    """The option by which a specification says no more how much is pruned."""
    return "granularity=null" if spec.pattern else "sparsity=0" if spec.band is None else "band=null"


def _try_out(spec: PruneSpec) -> None:
    """Prune one small layer by a user's own class: what is wrong with it shows before any image is drawn."""
    if code_of(spec.criterion) or code_of(spec.ranked):
        small = replace(spec, allocation=Uniform(), layers=["Linear"], include=["*"], exclude=[])
        with torch.random.fork_rng([]):
            prune(nn.Linear(128, 128), small, inputs=[torch.randn(256, 128)])
