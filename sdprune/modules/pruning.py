"""Pruning: make the masks, zero the weights, save a plain diffusers pipeline with its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional

from sdprune.calibration.settings import Calibration
from sdprune.errors import InputError
from sdprune.files import read_json, require_writable, write_json
from sdprune.identity import fingerprint, own_version
from sdprune.locks import RunLock
from sdprune.modules.base import CalibratingModule
from sdprune.modules.card import model_card, origin, records_of
from sdprune.modules.pruning_options import PruningOptions
from sdprune.modules.pruning_plan import PruningPlan
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pruning import Budget, PruneReport, PruneSpec, scopes
from sdprune.pruning.narrowing import NarrowReport, NarrowSpec
from sdprune.runs.record import clock
from sdprune.runs.summary import narrowed_line, path_table
from sdprune.runs.tracking import flat

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class PruningModule(CalibratingModule):
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
        narrow: by component, what is removed before weights are pruned, so that the model is smaller and faster:
            `--model.narrow.unet.channels=0.4`.
    """

    def __init__(
        self,
        pipeline: DiffusersFamily,
        prune: Dict[str, PruneSpec],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        calibration: Calibration = Calibration(),  # noqa: B008
        seed: int = 0,
        output: str = "runs",
        store: str = "runs/statistics",
        budget: Optional[Budget] = None,
        directory: Optional[str] = None,
        narrow: Dict[str, NarrowSpec] = {},  # noqa: B006 (not changed)
    ):
        super().__init__(pipeline)
        self.options = PruningOptions(prune, sampling, calibration, seed, store, budget, narrow)
        self.output, self.given = output, directory
        self.plan: Optional[PruningPlan] = None
        self.narrowed: Dict[str, NarrowReport] = {}

    @property
    def calibrates(self) -> bool:
        """Whether calibration captions are needed."""
        return self.options.calibrates

    def resolve(self, data: CocoDataModule, dtype: str) -> None:  # noqa: D102
        if self.plan is not None:
            return
        self.plan = self.options.resolve(self.pipeline, data, dtype)
        self.calibration = self.plan.calibration
        self.pipeline.check(self.options.sampling)
        self.plan.check(data)
        self.facts = self.plan.describe()
        directory = self.directory()
        require_writable(directory.parent, "--model.output" if self.given is None else "--model.directory")
        self._finished(directory)

    def directory(self) -> Path:
        """Where the pruned pipeline goes."""
        assert self.plan is not None
        if self.given is not None:
            return Path(self.given)
        return Path(self.output) / f"pruned-{self.plan.label()}-{fingerprint(self.facts)}"

    def _finished(self, directory: Path) -> bool:
        """Whether the result is there.

        Raises:
            InputError: the directory that was given holds something else.
        """
        path = directory / "pruning_report.json"
        report = read_json(path) if path.exists() else {}
        if self.given is None:
            return bool(report)
        if directory.exists() and report.get("fingerprint") != fingerprint(self.facts):
            if not directory.is_dir() or any(directory.iterdir()):
                held = "another pruned model" if report else "other files"
                raise InputError(f"{directory} holds {held}: choose another --model.directory, or empty this one.")
            return False
        return bool(report)

    def acquire(self) -> bool:
        """Wait while another run makes the same directory."""
        directory = self.directory().absolute()
        lock = RunLock(directory.parent, directory.name)
        self._locks.append(lock)
        return lock.acquire(lambda: self._finished(directory))

    def prepare(self) -> None:
        """Narrow the pipeline: what is pruned are the weights that are left."""
        assert self.plan is not None
        self.narrowed = self.narrow(self.plan)

    def finish(self) -> None:
        """Prune and save, unless that is done."""
        assert self.plan is not None
        directory = self.directory()
        if self.collector is None:
            written = (directory / "pruning_report.json").stat().st_mtime
            return self.say(f"This was finished already, {clock(written)}: {directory}")
        reports = self.plan.apply()
        if self.trainer.is_global_zero:
            self.save(self.plan, reports)

    def save(self, plan: PruningPlan, reports: Mapping[str, PruneReport]) -> None:
        """Write pipeline, card and report, as a whole or not at all."""
        directory = self.directory()
        sparsity = plan.account(reports)
        part = directory.absolute().with_name(f".{directory.absolute().name}.part")
        shutil.rmtree(part, ignore_errors=True)  # what a killed attempt left
        self.pipeline.save(part)
        measured = list(records_of(Path(self.output), self.facts))
        specs = {name: report.spec for name, report in reports.items()}
        card = model_card(
            origin(self.pipeline.model, self.pipeline.files.path),
            sparsity_table(sparsity),
            specs,
            measured,
            self.pipeline.unused,
            dict.fromkeys(self.pipeline.files.narrowed, "before this pruning")
            | {name: narrowed_line(report.summary()) for name, report in self.narrowed.items()},
            not self.pipeline.files.narrowed and all(report.stock for report in self.narrowed.values()),
        )
        (part / "README.md").write_text(card)
        for grid in [one.grid for one in measured if one.grid.is_file()][:1]:
            shutil.copyfile(grid, part / grid.name)
        layers = {name: [asdict(layer) for layer in report.layers] for name, report in reports.items()}
        pruning = {name: report.summary() for name, report in reports.items()}
        budget = plan.describe_budget()
        counts: Dict[str, Any] = {"sparsity": sparsity, "budget": budget, "pruning": pruning, "layers": layers}
        if self.narrowed:
            counts["narrowing"] = {name: report.describe() for name, report in self.narrowed.items()}
        identity = {"version": own_version(), "fingerprint": fingerprint(self.facts)}
        write_json(part / "pruning_report.json", {**counts, **identity})
        if self.given is None:
            shutil.rmtree(directory, ignore_errors=True)
        os.replace(part, directory)
        for logger in self.trainer.loggers:
            logger.log_hyperparams({"model": self.pipeline.name, "prune": plan.describe()["prune"]})
            logger.log_metrics(flat({"sparsity": sparsity}), step=0)
        self.say(sparsity_table(sparsity))
        for name, report in self.narrowed.items():
            self.say(f"  {name} is narrowed: {narrowed_line(report.summary())}")
        if budget and "path" in budget:
            self.say(path_table(budget))
        scored = f", with the scores of {', '.join(one.name for one in measured)}" if measured else ""
        if self.pipeline.unused:
            self.say(f"Not saved, since images are drawn without: {', '.join(self.pipeline.unused)}.")
        self.say(f"Saved: {directory}{scored}")


def sparsity_table(sparsity: Mapping[str, Any]) -> str:
    """Plain lines: the nominal sparsity, and what is pruned and zero in each scope."""
    rows = [("nominal (the study's count)", f"{sparsity['nominal']:.2%}", "")]
    for name, whole in scopes(sparsity).items():
        detail = f"{whole['pruned']:,} pruned, {whole['zeros']:,} zero of {whole['parameters']:,}"
        rows.append((name, f"{whole['pruned_fraction']:.2%}", detail))
    return "\n".join(f"  {name:<28}{share:>8}   {detail}".rstrip() for name, share, detail in rows)
