"""What is to be pruned and how, as it was configured, and what becomes of it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn

from sdprune.api import prune
from sdprune.calibration.settings import Calibration
from sdprune.calibration.store import StatisticsStore
from sdprune.errors import InputError
from sdprune.identity import code_of
from sdprune.modules.calibration_plan import CalibrationPlan
from sdprune.modules.narrowing_plan import NarrowingPlan, narrowing_requests, narrowing_specs
from sdprune.modules.prompts import PromptSubject, Requests
from sdprune.modules.pruning_plan import PruningPlan, model_facts, size_of
from sdprune.pipelines import Component, DiffusersFamily, Sampling
from sdprune.pruning import Budget, PruneSpec
from sdprune.pruning.allocation.sensitivity import Sensitivity
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.narrowing import NarrowSpec
from sdprune.pruning.spec import AGREEMENT

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


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
        sizes = {name: size_of(narrowing.meta_module(name), spec) for name, spec in specs.items()}
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
