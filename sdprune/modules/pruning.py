"""Pruning: make the masks, zero the weights, save a plain diffusers pipeline with its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional

import torch
from torch import nn

from sdprune.data import Batch
from sdprune.errors import InputError
from sdprune.identity import code_of, facts_of, fingerprint, own_version, package_code
from sdprune.modules.base import FrozenModule
from sdprune.modules.calibrator import Calibrator, of_everyone
from sdprune.modules.card import model_card, origin, records_of
from sdprune.modules.needs import Calibration, Need, Needs, is_text
from sdprune.pipelines import PipelineFamily, Sampling
from sdprune.pruning import (
    Budget,
    InfeasibleError,
    PruneReport,
    PruneSpec,
    Size,
    Uniform,
    account,
    apply,
    prune,
    targets_of,
    wholes,
)
from sdprune.pruning.spec import AGREEMENT
from sdprune.record import clock, label, read_json, require_writable, write_json
from sdprune.store import StatisticsStore

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class PruningPlan:
    """What is to be pruned and how, and the statistics that this needs.

    Args:
        pipeline: the model.
        prune: by component; components at sparsity 0 stay dense.
        sampling: how images are drawn in calibration.
        calibration: what counts there.
        seed: of the calibration's noise.
        store: where statistics are kept.
        budget: decides the components' sparsities, if given; those of `prune` then are 0 or agree with it.
    """

    def __init__(
        self, pipeline: PipelineFamily, prune: Mapping[str, PruneSpec], sampling: Sampling, calibration: Calibration,
        seed: int, store: str, budget: Optional[Budget] = None,
    ):  # fmt: skip
        self.pipeline, self.sampling, self.calibration, self.seed = pipeline, sampling, calibration, seed
        self.asked, self.budget = dict(prune), budget
        self.store = StatisticsStore(store)

    @property
    def wanted(self) -> bool:
        """Whether anything is to be pruned; needs no look at the model."""
        return self.budget is not None or any(not spec.dense for spec in self.asked.values())

    @cached_property
    def specs(self) -> dict[str, PruneSpec]:
        """What is pruned, by component.

        Raises:
            InfeasibleError: the budget cannot be met.
            InputError: the budget gives a component another sparsity than its specification.
        """
        specs = self.asked if self.budget is None else self._budgeted(self.budget)
        return {name: spec for name, spec in specs.items() if not spec.dense}

    @property
    def infeasible(self) -> Optional[str]:
        """Why the budget cannot be met, if it cannot."""
        try:
            _ = self.specs
        except InfeasibleError as error:
            return error.reason
        return None

    def _budgeted(self, budget: Budget) -> dict[str, PruneSpec]:
        """All prunable components at the sparsities that the budget gives them."""
        self.pipeline.require(list(self.asked))
        specs = {name: self.asked.get(name, PruneSpec()) for name in self.pipeline.prunable}
        sizes = {name: self._size(name, spec) for name, spec in specs.items()}
        sparsities = budget.sparsities(sizes, [name for name in sizes if is_text(name)])
        asked = {
            name: spec.pattern[0] / spec.pattern[1] if spec.pattern else spec.nominal for name, spec in specs.items()
        }
        unlike = [name for name in specs if asked[name] and abs(asked[name] - sparsities[name]) > AGREEMENT]
        if unlike:
            told = ", and ".join(
                f"{name} a sparsity of {sparsities[name]:g}, where --model.prune.{name} has {asked[name]:g}"
                for name in unlike
            )
            free = " ".join(f"--model.prune.{name}.{_without_sparsity(specs[name])}" for name in unlike)
            raise InputError(f"--model.budget.total={budget.total:g} gives {told}. Leave it to the budget: {free}")
        return {
            name: spec if spec.nominal else replace(spec, sparsity=sparsities[name]) for name, spec in specs.items()
        }

    def _size(self, name: str, spec: PruneSpec) -> Size:
        skeleton = self.pipeline.skeleton(name)
        weights = sum(target.weight.numel() for target in targets_of(skeleton, spec))
        return Size(sum(parameter.numel() for parameter in skeleton.parameters()), weights)

    @property
    def calibrates(self) -> bool:
        """Whether any criterion or allocation needs statistics; none does under an infeasible budget."""
        return self.infeasible is None and any(spec.statistics for spec in self.specs.values())

    def describe(self) -> dict[str, Any]:
        """What the pruned weights depend on, statistics apart."""
        return {name: spec.describe() for name, spec in sorted(self.specs.items())}

    def facts(self, data: CocoDataModule, dtype: str) -> list[dict[str, Any]]:
        """What the statistics depend on."""
        return [need.facts for need in self.needs(data, dtype)]

    def check(self, data: CocoDataModule, dtype: str) -> None:
        """Everything that can be told before the model is loaded: names, layer patterns, statistics."""
        self.pipeline.require(list(self.asked))
        self.pipeline.check(self.sampling)
        for name, spec in self.specs.items():
            targets_of(self.pipeline.skeleton(name), spec)
            _try_out(spec)
        if self.calibrates:
            _ = data.calibration_examples  # enough captions
        self.store.check(self.facts(data, dtype))

    def calibrator(self, data: CocoDataModule, dtype: str) -> Calibrator:
        """Gathers what the store lacks."""
        needs = self.needs(data, dtype)
        return Calibrator(self.pipeline, needs, self.sampling, self.seed, self.calibration, self.store)

    def apply(self, data: CocoDataModule, dtype: str) -> dict[str, PruneReport]:
        """Prune every component in place, with statistics from the store."""
        reports = {}
        for name, (dense, own) in self._needs(data, dtype).items():
            before = {need.statistic: self.store.load(need.facts) for need in dense}
            statistics = {need.statistic: self.store.load(need.facts) for need in own}
            reports[name] = apply(self.pipeline.components[name], self.specs[name], statistics, before)
        _require_equal_masks(reports)
        return reports

    def account(self, reports: Mapping[str, PruneReport]) -> dict[str, Any]:
        """Asked and achieved sparsities of the pipeline as it is now."""
        return account(self.pipeline.components, reports, self.pipeline.prunable)

    def _needs(self, data: CocoDataModule, dtype: str) -> dict[str, tuple[list[Need], list[Need]]]:
        """By component, what its allocation reads and what its criterion does."""
        needs = Needs(self.pipeline, data, self.sampling, self.seed, self.calibration, dtype)
        return {
            name: (needs.of_allocation(name, spec), needs.of_pruning(name, spec)) for name, spec in self.specs.items()
        }

    def needs(self, data: CocoDataModule, dtype: str) -> list[Need]:
        """The statistics that allocations and criteria read."""
        return [need for pair in self._needs(data, dtype).values() for needs in pair for need in needs]


def _without_sparsity(spec: PruneSpec) -> str:
    """The option by which a specification says no more how much is pruned."""
    return "granularity=null" if spec.pattern else "sparsity=0" if spec.band is None else "band=null"


def _try_out(spec: PruneSpec) -> None:
    """Prune one small layer by a user's own criterion: what is wrong with it shows before any image is drawn."""
    if code_of(spec.criterion):
        small = replace(spec, allocation=Uniform(), layers=["Linear"], include=["*"], exclude=[])
        with torch.random.fork_rng([]):
            prune(nn.Linear(128, 128), small, inputs=[torch.randn(256, 128)])


def _require_equal_masks(reports: Mapping[str, PruneReport]) -> None:
    own = {name: report.mask_hash for name, report in reports.items()}
    everyone = of_everyone(own)
    if any(other != own for other in everyone):
        raise RuntimeError(f"Processes made different masks: {everyone}.")


def summary(reports: Mapping[str, PruneReport]) -> dict[str, Any]:
    """The reports without their layers."""
    return {
        name: {"spec": r.spec, "mask_hash": r.mask_hash, "weights": r.weights, "pruned": r.pruned, "zeros": r.zeros}
        for name, r in reports.items()
    }


class PruningModule(FrozenModule):
    """Prune a model after training and save it: `sdprune fit`; gathers missing statistics first.

    The result is `<output>/pruned-<label>-<fingerprint>/`: a diffusers directory, a model card, pruning_report.json.

    Args:
        pipeline: the model.
        prune: how, by component: `--model.prune.unet.sparsity=0.35`.
        sampling: how images are drawn when a criterion needs calibration of the U-Net.
        calibration: what counts there, and how much memory it may take.
        seed: of the calibration's noise.
        output: directory of all results.
        store: directory of calibration statistics.
        budget: one sparsity for the whole model, which decides those of its components: those of `prune` then are 0 or
            agree with it.
        directory: where the result goes, instead of a directory in `output` that is named after the pruning.
    """

    def __init__(
        self,
        pipeline: PipelineFamily,
        prune: Dict[str, PruneSpec],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        calibration: Calibration = Calibration(),  # noqa: B008
        seed: int = 0,
        output: str = "runs",
        store: str = "runs/statistics",
        budget: Optional[Budget] = None,
        directory: Optional[str] = None,
    ):
        super().__init__(pipeline)
        self.plan = PruningPlan(pipeline, prune, sampling, calibration, seed, store, budget)
        self.output, self.given = output, directory

    @property
    def calibrates(self) -> bool:  # noqa: D102
        return self.plan.calibrates

    def check(self, data: CocoDataModule, dtype: str) -> None:
        """Everything that can be told before the model is loaded."""
        self.plan.check(data, dtype)
        directory = self.directory(data, dtype)
        require_writable(directory.parent, "--model.output" if self.given is None else "--model.directory")
        self._finished(directory, self.facts(data, dtype))

    def _finished(self, directory: Path, facts: Mapping[str, Any]) -> bool:
        """Whether the result is there.

        Raises:
            InputError: the directory that was given holds something else.
        """
        path = directory / "pruning_report.json"
        report = read_json(path) if path.exists() else {}
        if self.given is None:
            return bool(report)
        if directory.exists() and report.get("fingerprint") != fingerprint(facts):
            if not directory.is_dir() or any(directory.iterdir()):
                held = "another pruned model" if report else "other files"
                raise InputError(f"{directory} holds {held}: choose another --model.directory, or empty this one.")
            return False
        return bool(report)

    def facts(self, data: CocoDataModule, dtype: str) -> dict[str, Any]:
        """What the pruned weights depend on."""
        return {
            "version": package_code(), "pipeline": facts_of(self.pipeline), "prune": self.plan.describe(),
            "calibration": self.plan.facts(data, dtype), "dtype": dtype,
        }  # fmt: skip

    def directory(self, data: CocoDataModule, dtype: str) -> Path:
        """Where the pruned pipeline goes."""
        if self.given is not None:
            return Path(self.given)
        return Path(self.output) / f"pruned-{label(self.plan.specs)}-{fingerprint(self.facts(data, dtype))}"

    def on_fit_start(self) -> None:
        """Load the model and see what has to be gathered."""
        needs = self.plan.needs(self.data, self.precision_name)  # an infeasible budget ends here
        self.load()
        self.claims = self.claim_statistics(self.plan.store, needs)
        self.calibrator = self.plan.calibrator(self.data, self.precision_name)
        self.calibrator.watch.start(self.on_calibration, self.data.calibration_n, self.data.calibration_batch_size)
        self.train_for_as_many_passes_as_it_takes()

    def training_step(self, batch: Batch) -> None:
        """One batch of calibration, if any is missing."""
        self.calibrator.step(batch)

    def on_train_epoch_end(self) -> None:
        """A pass is over; after the last one prune and save."""
        self.calibrator.end_pass(self.trainer.strategy)
        if not self.calibrator.done:
            return
        self.trainer.should_stop = True
        directory = self.directory(self.data, self.precision_name)
        reports = self.plan.apply(self.data, self.precision_name)
        if self.trainer.is_global_zero:
            self.save(directory, reports)
        self.trainer.strategy.barrier("saved")
        for claim in self.claims:
            claim.release()

    def save(self, directory: Path, reports: Mapping[str, PruneReport]) -> None:
        """Write pipeline, card and report, as a whole or not at all; a finished directory is left as it is."""
        facts = self.facts(self.data, self.precision_name)
        if self._finished(directory, facts):
            written = (directory / "pruning_report.json").stat().st_mtime
            return self.tell(f"This was finished already, {clock(written)}: {directory}")
        sparsity = self.plan.account(reports)
        part = directory.absolute().with_name(f".{directory.absolute().name}.part")
        shutil.rmtree(part, ignore_errors=True)  # what a killed attempt left
        self.pipeline.save(part)
        measured = list(records_of(Path(self.output), facts))
        specs = {name: report.spec for name, report in reports.items()}
        card = model_card(
            origin(*self.pipeline.origin()), sparsity_table(sparsity), specs, measured, self.pipeline.unused
        )
        (part / "README.md").write_text(card)
        layers = {name: [asdict(layer) for layer in report.layers] for name, report in reports.items()}
        report = {"sparsity": sparsity, "pruning": summary(reports), "layers": layers, "version": own_version()}
        write_json(part / "pruning_report.json", {**report, "fingerprint": fingerprint(facts)})
        if self.given is None:
            shutil.rmtree(directory, ignore_errors=True)
        os.replace(part, directory)
        for logger in self.trainer.loggers:
            logger.log_hyperparams({"model": self.pipeline.name, "prune": self.plan.describe()})
            logger.log_metrics(flat({"sparsity": sparsity}), step=0)
        self.tell(sparsity_table(sparsity))
        scored = f", with the scores of {', '.join(one.name for one in measured)}" if measured else ""
        if self.pipeline.unused:
            self.tell(f"Not saved, since images are drawn without: {', '.join(self.pipeline.unused)}.")
        self.tell(f"Saved: {directory}{scored}")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested mapping, keyed `a/b/c`."""
    result: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            result[f"{prefix}{key}"] = value
    return result


def sparsity_table(sparsity: Mapping[str, Any]) -> str:
    """Plain lines: what was asked, what was pruned and what is zero, over ever larger wholes."""
    rows = [("nominal (the study's count)", f"{sparsity['nominal']:.2%}", "")]
    for name, whole in wholes(sparsity).items():
        detail = f"{whole['pruned']:,} pruned, {whole['zeros']:,} zero of {whole['parameters']:,}"
        rows.append((name, f"{whole['pruned_fraction']:.2%}", detail))
    return "\n".join(f"  {name:<28}{share:>8}   {detail}".rstrip() for name, share, detail in rows)
