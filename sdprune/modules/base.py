"""What the three modules share: a pipeline that is not trained, on the trainer's device and in its dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning import LightningModule
from torch import nn

from sdprune.errors import InputError
from sdprune.locks import Claim
from sdprune.modules.calibration_state import CalibrationState
from sdprune.modules.needs import Need
from sdprune.pipelines import PipelineFamily
from sdprune.store import StatisticsStore

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


class FrozenModule(LightningModule, ABC):
    """Holds a pipeline outside the module tree, so that neither DDP nor checkpoints nor casts reach it."""

    def __init__(self, pipeline: PipelineFamily):
        super().__init__()
        self._pipeline = [pipeline]
        self.automatic_optimization = False
        self.on_calibration: Callable[[CalibrationState], None] = lambda state: None
        """Is called as calibration goes on."""
        self.anchor = nn.Parameter(torch.zeros(()))  # `fit` under DDP wants something to train

    @property
    def pipeline(self) -> PipelineFamily:
        """The model."""
        return self._pipeline[0]

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

    def directory(self, data: CocoDataModule, dtype: str) -> Path | None:
        """Where the result goes, `<label>-<fingerprint>`, if it has a directory of its own."""
        return None

    def claim(self, output: str | Path, name: str) -> Claim:
        """The right to make something below `output` that other runs may want too."""
        strategy = self.trainer.strategy
        return Claim(Path(output) / ".locks" / f"{name}.lock", strategy.broadcast, strategy.is_global_zero)

    def claim_statistics(self, store: StatisticsStore, needs: Iterable[Need]) -> list[Claim]:
        """Wait until no other run gathers statistics of these components in this store; collective.

        Returns:
            To be released when the missing ones are gathered; empty if none are missing.
        """
        needs = [need for need in needs if need.facts not in store]
        for path in dict.fromkeys(path for need in needs for path in store.damaged(need.facts)):
            self.tell(f"{path} is damaged: its statistics are gathered again.")
        missing = sorted({need.component for need in needs})
        claims = [self.claim(store.root, f"statistics-{name}") for name in self.trainer.strategy.broadcast(missing)]
        for claim in claims:
            claim.acquire(lambda: False)
        return claims

    def load(self) -> None:
        """Put the pipeline on this process's device in the trainer's dtype; mixed precision keeps fp32 weights."""
        self.pipeline.load(_DTYPES.get(self.precision_name, torch.float32), self.trainer.strategy.root_device)

    def train_for_as_many_passes_as_it_takes(self) -> None:
        """An epoch is a pass over the calibration batches, and `trainer.should_stop` ends the last one."""
        self.trainer.fit_loop.max_epochs = -1

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    def tell(self, line: str) -> None:
        """Print on the first process only."""
        if self.trainer.is_global_zero:
            print(line, flush=True)

    @property
    @abstractmethod
    def calibrates(self) -> bool:
        """Whether calibration prompts are needed, so that they must be there."""

    @abstractmethod
    def check(self, data: CocoDataModule, dtype: str) -> None:
        """Raise InputError for everything that can be told before the model is loaded."""
