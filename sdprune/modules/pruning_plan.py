"""What is to be pruned and how: resolved once, before anything is loaded, and passed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from sdprune.api import prune
from sdprune.calibration.collect import Collector
from sdprune.calibration.execution import order_of_calls
from sdprune.calibration.progress import CalibrationState
from sdprune.calibration.requests import Request
from sdprune.calibration.settings import Calibration
from sdprune.calibration.store import StatisticsStore
from sdprune.errors import InputError
from sdprune.identity import DRAWING, code_of, facts_of, package_code
from sdprune.modules.narrowing_plan import NarrowingPlan, narrowing_requests, narrowing_specs
from sdprune.modules.prompts import PromptSubject, Requests
from sdprune.pipelines import Component, DiffusersFamily, Sampling
from sdprune.processes import Processes
from sdprune.pruning import Budget, PruneReport, PruneSpec, Size, account, apply, targets_of
from sdprune.pruning.allocation.sensitivity import Sensitivity, units_of
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.budget import Split
from sdprune.pruning.narrowing import NarrowSpec
from sdprune.pruning.spec import AGREEMENT
from sdprune.pruning.statistics.pruned_error import PrunedError
from sdprune.runs.label import label

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
            self.calibration.kept,
            data.calibration_batch_size,
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
            sizes[name] = _size(module, spec)
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
        narrow: by component, what is removed before anything is pruned.
    """

    prune: Mapping[str, PruneSpec]
    sampling: Sampling
    calibration: Calibration
    seed: int
    store: str
    budget: Optional[Budget] = None
    narrow: Mapping[str, NarrowSpec] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        """Whether anything is to be pruned or narrowed; needs no look at the model."""
        return (
            any(spec.removes for spec in self.narrow.values())
            or self.budget is not None
            or any(not spec.dense for spec in self.prune.values())
        )

    @property
    def calibrates(self) -> bool:
        """Whether calibration captions have to be there; needs no look at the model."""
        specs = [spec for spec in self.prune.values() if not spec.dense or self.budget is not None]
        measured = self.budget is not None and self.budget.measured
        narrowed = any(spec.calibrates for spec in self.narrow.values())
        return measured or narrowed or any(spec.criterion.statistics or spec.allocation.statistics for spec in specs)

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
        pipeline.require([*self.prune, *self.narrow])
        narrowing = self._narrowing(pipeline, data, dtype)
        own = {name: without_idle(self.prune.get(name, PruneSpec()), one) for name, one in pipeline.prunable.items()}
        _check_names(narrowing.specs, own)
        specs = own if self.budget is None else self._budgeted(self.budget, narrowing, own)
        specs = {name: spec for name, spec in specs.items() if not spec.dense}
        for spec in specs.values():
            _try_out(spec)
        wanted = any(spec.statistics for spec in specs.values())
        requests = self.requests(pipeline, data, dtype, wanted, narrowing.describe())
        needed = {
            name: (requests.of_allocation(name, spec), requests.of_criterion(name, spec))
            for name, spec in specs.items()
        }
        flat = tuple(one for pair in needed.values() for part in pair for one in part)
        calibration = CalibrationPlan(requests.subjects, flat, StatisticsStore(self.store), self.calibration)
        return PruningPlan(pipeline, dtype, specs, needed, calibration, narrowing, self.budget)

    def _narrowing(self, pipeline: DiffusersFamily, data: CocoDataModule, dtype: str) -> NarrowingPlan:
        specs = narrowing_specs(pipeline, self.narrow)
        requests = self.requests(pipeline, data, dtype, any(spec.calibrates for spec in specs.values()))
        read = narrowing_requests(pipeline, specs, requests)
        choosing, refitting = (
            CalibrationPlan(
                requests.subjects, tuple(one for pair in read.values() for one in pair[number]),
                StatisticsStore(self.store), self.calibration,
            )
            for number in (0, 1)
        )  # fmt: skip
        return NarrowingPlan(pipeline, specs, read, choosing, refitting)

    def requests(
        self, pipeline: DiffusersFamily, data: CocoDataModule, dtype: str, wanted: bool = True,
        narrowed: Mapping[str, Any] | None = None,
    ) -> Requests:  # fmt: skip
        """Writes requests for statistics; without any being wanted, captions need not be there.

        Args:
            pipeline: the model.
            data: has the calibration prompts.
            dtype: the trainer's precision.
            wanted: whether there will be any.
            narrowed: how the model is narrowed before.
        """
        subjects = {
            name: PromptSubject(component, self.sampling, self.seed, self.calibration)
            for name, component in pipeline.prunable.items()
        }
        facts = {**model_facts(pipeline, dtype), **(narrowed or {})}
        return Requests(subjects, facts | ({"prompts": data.describe_calibration()} if wanted else {}))

    def _budgeted(
        self, budget: Budget, narrowing: NarrowingPlan, specs: Mapping[str, PruneSpec]
    ) -> dict[str, PruneSpec]:
        """All prunable components at the sparsities that the budget gives them, or to be measured for its total."""
        components = narrowing.pipeline.prunable
        for name, spec in narrowing.specs.items():
            if spec.measured:
                raise InputError(
                    f"--model.narrow.{name}.{spec.measured} leaves the number of weights to measurement, and "
                    f"--model.budget counts them before: give heads, neurons and channels in place of {spec.measured}."
                )
        sizes = {name: _size(narrowing.meta_module(name), spec) for name, spec in specs.items()}
        text = [name for name, component in components.items() if component.role == "text"]
        if budget.measured:
            budget.zeros(sizes)  # before anything is measured
        sparsities: Mapping[str, float | None] = (
            dict.fromkeys(specs) if budget.measured else budget.sparsities(sizes, text)
        )
        requested = {
            name: spec.pattern[0] / spec.pattern[1] if spec.pattern else spec.nominal for name, spec in specs.items()
        }
        unlike = [name for name in specs if requested[name] and not _agree(requested[name], sparsities[name])]
        if unlike:
            conflicts = ", and ".join(
                f"{name} {_words(sparsities[name])}, where --model.prune.{name} has {requested[name]:g}"
                for name in unlike
            )
            free = " ".join(f"--model.prune.{name}.{_without_sparsity(specs[name])}" for name in unlike)
            raise InputError(f"--model.budget.total={budget.total:g} gives {conflicts}. Leave it to the budget: {free}")
        if budget.measured:
            return {name: _to_be_measured(name, spec, budget.total) for name, spec in specs.items()}
        return {
            name: spec if spec.nominal else replace(spec, sparsity=sparsities[name]) for name, spec in specs.items()
        }


def without_idle(spec: PruneSpec, component: Component) -> PruneSpec:
    """A specification that leaves out the layers that no picture depends on."""
    idle = [pattern for pattern in component.idle(spec.layers) if pattern not in spec.exclude]
    return replace(spec, exclude=[*spec.exclude, *idle]) if idle else spec


def _check_names(narrow: Mapping[str, NarrowSpec], prune: Mapping[str, PruneSpec]) -> None:
    """Refuse patterns on the names of layers that will be numbered anew when it is known which are dropped."""
    for name, spec in prune.items():
        if name in narrow and narrow[name].layers and not spec.dense and (spec.exclude or spec.include != ["*"]):
            raise InputError(
                f"--model.narrow.{name}.layers numbers layers anew, and --model.prune.{name} chooses layers by name: "
                "narrow alone (sdprune fit with --model.prune={}), and prune the model that it saves."
            )


def model_facts(pipeline: DiffusersFamily, dtype: str) -> dict[str, Any]:
    """Code, model and precision: what every statistic, mask and picture depends on."""
    return {"version": package_code(*DRAWING), "pipeline": facts_of(pipeline), "dtype": dtype}


def _size(module: nn.Module, spec: PruneSpec) -> Size:
    weights = sum(target.weight.numel() for target in targets_of(module, spec))
    return Size(sum(parameter.numel() for parameter in module.parameters()), weights)


def _agree(requested: float, given: float | None) -> bool:
    return given is not None and abs(requested - given) <= AGREEMENT


def _words(sparsity: float | None) -> str:
    return "a measured sparsity" if sparsity is None else f"a sparsity of {sparsity:g}"


def _to_be_measured(name: str, spec: PruneSpec, total: float) -> PruneSpec:
    """A specification by which the component's layers are measured for a total: at its errors in the prediction."""
    given = spec.allocation
    option = f"--model.budget.split=sensitivity measures the dense model, and --model.prune.{name}"
    if type(given) not in (Uniform, Sensitivity):
        raise InputError(f"{option}.allocation is {type(given).__name__}: leave it out, or choose Sensitivity.")
    if spec.ranked.whole_component:
        raise InputError(f"{option}.granularity={spec.granularity} ranks all layers together: choose another one.")
    for choice, needed in (("order", "one_pass"), ("mode", "exact")):
        if getattr(spec, choice) != needed:
            raise InputError(f"{option}.{choice} is {getattr(spec, choice)}: choose {needed}.")
    measured = Sensitivity(read_at="prediction")
    if isinstance(given, Sensitivity):
        measured = Sensitivity(given.unit, given.levels, given.samples, given.steps, measured.read_at)
    return replace(spec, sparsity=total, allocation=measured)


def _without_sparsity(spec: PruneSpec) -> str:
    """The option by which a specification says no more how much is pruned."""
    return "granularity=null" if spec.pattern else "sparsity=0" if spec.band is None else "band=null"


def _try_out(spec: PruneSpec) -> None:
    """Prune one small layer by a user's own class: what is wrong with it shows before any image is drawn."""
    if code_of(spec.criterion) or code_of(spec.ranked):
        small = replace(spec, allocation=Uniform(), layers=["Linear"], include=["*"], exclude=[])
        with torch.random.fork_rng([]):
            prune(nn.Linear(128, 128), small, inputs=[torch.randn(256, 128)])
