"""The statistics that a run needs: which are missing, and what gathers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdprune.calibration.collect import Collector
from sdprune.calibration.progress import CalibrationState
from sdprune.calibration.requests import Request
from sdprune.calibration.settings import Calibration
from sdprune.calibration.store import StatisticsStore
from sdprune.modules.prompts import PromptSubject
from sdprune.processes import Processes

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
