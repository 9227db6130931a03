"""What the modules share: a pipeline that is not trained, on the trainer's device and in its dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule

from sdprune.calibration.collect import Collector
from sdprune.calibration.progress import CalibrationState
from sdprune.data import Batch
from sdprune.errors import InputError
from sdprune.locks import RunLock
from sdprune.modules.calibration_plan import CalibrationPlan
from sdprune.modules.pruning_plan import PruningPlan
from sdprune.pipelines import DiffusersFamily
from sdprune.processes import Processes
from sdprune.pruning.narrowing import NarrowReport

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


class FrozenModule(LightningModule, ABC):
    """Holds a pipeline outside the module tree, so that neither DDP nor checkpoints nor casts reach it."""

    def __init__(self, pipeline: DiffusersFamily):
        super().__init__()
        self._pipeline = [pipeline]
        self.on_calibration: Callable[[CalibrationState], None] = lambda state: None
        """Is called as calibration goes on."""

    @property
    def pipeline(self) -> DiffusersFamily:
        """The model."""
        return self._pipeline[0]

    @pipeline.setter
    def pipeline(self, pipeline: DiffusersFamily) -> None:
        self._pipeline[0] = pipeline

    @property
    def data(self) -> CocoDataModule:
        """The trainer's data module."""
        from sdprune.data import CocoDataModule

        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, CocoDataModule):
            raise InputError(f"{type(self).__name__} needs --data CocoDataModule, got {type(data).__name__}.")
        return data

    @property
    def precision_name(self) -> str:
        """The trainer's precision, e.g. `16-true`: it decides the weights' dtype."""
        return str(self.trainer.precision)

    @property
    @abstractmethod
    def calibrates(self) -> bool:
        """Whether calibration captions are needed."""

    @abstractmethod
    def resolve(self, data: CocoDataModule, dtype: str) -> None:
        """Decide everything that can be decided before the model is loaded; once.

        Raises:
            InputError: for everything that can be found wrong by then.
        """

    @abstractmethod
    def directory(self) -> Path | None:
        """Where the result goes, if it has a directory of its own; known once the run is resolved."""

    def require_all_batches(self) -> None:
        """Raise InputError for a trainer that goes over a part of the batches only."""
        limit = self.trainer.limit_predict_batches
        if isinstance(limit, int) or limit < 1:
            raise InputError(
                f"The trainer takes {limit} of the batches: leave out --trainer.limit_predict_batches and "
                "--trainer.fast_dev_run, and give a smaller --data.n or --data.calibration_n."
            )

    def lock_statistics(self, plan: CalibrationPlan) -> list[RunLock]:
        """Wait until no other run gathers statistics that this one lacks; collective.

        Returns:
            Locks, to be released when the missing ones are gathered; empty if none are missing.
        """
        for path in dict.fromkeys(path for one in plan.missing for path in plan.store.damaged(one.facts)):
            self.say(f"{path} is damaged: its statistics are gathered again.")
        missing = Processes().broadcast(sorted({one.component for one in plan.missing}))
        locks = [RunLock(plan.store.root, f"statistics-{name}") for name in missing]
        for lock in locks:
            lock.acquire()
        return locks

    def gather(self, plan: CalibrationPlan) -> None:
        """Gather what the store lacks, outside the predict loop; collective."""
        locks = self.lock_statistics(plan)
        if locks:  # else no captions need be there
            with self.trainer.precision_plugin.forward_context():  # as in the predict loop of `fit`
                self.collector_of(plan).run(self.calibration_batches)
        for lock in locks:
            lock.release()

    def collector_of(self, plan: CalibrationPlan) -> Collector:
        """Gathers what the store lacks; says what it costs first."""
        collector = plan.collector(self.data, self.on_calibration)
        for line in collector.costs:
            self.say(line)
        return collector

    def narrow(self, plan: PruningPlan) -> dict[str, NarrowReport]:
        """Narrow the loaded pipeline, once the statistics for that are gathered; collective."""
        narrowing = plan.narrowing
        self.gather(narrowing.choosing)
        units = narrowing.choose()
        with narrowing.pairing(units):
            self.gather(narrowing.refitting)
        return narrowing.apply(units)

    def calibration_batches(self) -> Iterator[tuple[Batch, int, int]]:
        """The calibration batches of this process, each with its number and how many captions of it count."""
        return ((batch, batch.index, batch.valid) for batch in self.data.calibration_loader())

    def load(self) -> None:
        """Put the pipeline on this process's device in the trainer's dtype; mixed precision keeps fp32 weights."""
        self.pipeline.load(_DTYPES.get(self.precision_name, torch.float32), self.trainer.strategy.root_device)

    def say(self, line: str) -> None:
        """Print on the first process only."""
        if self.trainer.is_global_zero:
            print(line, flush=True)


class CalibratingModule(FrozenModule):
    """Goes over the calibration captions in the predict loop, one dataloader a pass, and then finishes."""

    calibration: CalibrationPlan

    def setup(self, stage: str) -> None:
        """Load the model, unless the result is there; what the store has already is not gathered again."""
        self.require_all_batches()
        self.resolve(self.data, self.precision_name)
        self._pass = self.data.passes = 0
        self._locks: list[RunLock] = []
        self.collector: Collector | None = None
        if self.acquire():
            self.load()
            self.prepare()
            self._locks += self.lock_statistics(self.calibration)
            self.collector = self.collector_of(self.calibration)
            self.data.passes = self.collector.passes

    def prepare(self) -> None:
        """Change the loaded pipeline before it is calibrated; collective."""

    def acquire(self) -> bool:
        """Whether the result is this run's to make; collective."""
        return True

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """One batch of calibration captions, if any statistics are missing."""
        if self.collector is None:
            return []
        if dataloader_idx > self._pass:
            self.collector.end_pass()
            self._pass = dataloader_idx
        self.collector.step(batch, batch.index, batch.valid)
        return []

    def on_predict_epoch_end(self) -> None:
        """The last pass is over; one more than was planned follows where stored files were damaged meanwhile."""
        if self.collector is not None:
            self.collector.end_pass()
            self.collector.run(self.calibration_batches)
        self.finish()
        self.collector = None  # it refers to the model
        Processes().barrier()
        for lock in self._locks:
            lock.release()

    @abstractmethod
    def finish(self) -> None:
        """All statistics are in the store."""
