"""Calibration alone: fill the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, List

from sdprune.data import Batch
from sdprune.errors import InputError, unknown
from sdprune.modules.base import FrozenModule
from sdprune.modules.calibrator import Calibrator
from sdprune.modules.needs import Calibration, Need, Needs
from sdprune.pipelines import PipelineFamily, Sampling
from sdprune.pruning import STATISTICS, Timesteps, find_targets
from sdprune.store import StatisticsStore

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class CalibrationModule(FrozenModule):
    """Fill the store with the dense model's statistics: `sdprune fit`. Pruning finds them there.

    Args:
        pipeline: the model.
        components: what to calibrate, e.g. [text_encoder, unet].
        statistics: what to gather: input_norm (Wanda, OWL), hessian (SparseGPT).
        layers: kinds of layer: Linear, Conv2d.
        timesteps: how much denoising steps count in Hessians: uniform, linear, log_decrease, log_increase. Input norms
            are kept by step and weighted afterwards.
        sampling: how images are drawn when the U-Net is calibrated.
        calibration: what counts, and how much memory Hessians may take.
        seed: of the noise.
        store: directory of the statistics.
    """

    def __init__(
        self,
        pipeline: PipelineFamily,
        components: List[str],
        statistics: List[str] = ["input_norm"],  # noqa: B006 (not changed)
        layers: List[str] = ["Linear"],  # noqa: B006
        timesteps: Timesteps = "uniform",
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        calibration: Calibration = Calibration(),  # noqa: B008
        seed: int = 0,
        store: str = "runs/statistics",
    ):
        super().__init__(pipeline)
        if not components:
            raise InputError("components is empty: name what to calibrate, as in [text_encoder, unet].")
        if not statistics:
            raise InputError(f"statistics is empty: choose from {', '.join(STATISTICS)}.")
        for name in statistics:
            if name not in STATISTICS:
                raise unknown("statistic", name, STATISTICS)
        self.components, self.statistics, self.layers, self.timesteps = components, statistics, layers, timesteps
        self.sampling, self.calibration, self.seed = sampling, calibration, seed
        self.store = StatisticsStore(store)

    calibrates = True

    def check(self, data: CocoDataModule, dtype: str) -> None:
        """Everything that can be told before the model is loaded."""
        self.pipeline.require(self.components)
        self.pipeline.check(self.sampling)
        for component in self.components:
            find_targets(self.pipeline.skeleton(component), self.layers)
        _ = data.calibration_examples  # enough captions
        self.store.check(need.facts for need in self._needs(data, dtype))

    def on_fit_start(self) -> None:
        """Load the model; what the store has already is not gathered again."""
        self.load()
        self.needs = self._needs(self.data, self.precision_name)
        self.claims = self.claim_statistics(self.store, self.needs)
        self.there = [need.facts in self.store for need in self.needs]
        self.calibrator = Calibrator(self.pipeline, self.needs, self.sampling, self.seed, self.calibration, self.store)
        self.calibrator.watch.start(self.on_calibration, self.data.calibration_n, self.data.calibration_batch_size)
        self.train_for_as_many_passes_as_it_takes()

    def _needs(self, data: CocoDataModule, dtype: str) -> list[Need]:
        needs = Needs(self.pipeline, data, self.sampling, self.seed, self.calibration, dtype)
        return [
            needs.of_model(component, name, self.layers, self.timesteps)
            for component in self.components
            for name in self.statistics
        ]

    def training_step(self, batch: Batch) -> None:
        """One batch of prompts."""
        self.calibrator.step(batch)

    def on_train_epoch_end(self) -> None:
        """A pass is over; save."""
        self.calibrator.end_pass(self.trainer.strategy)
        if self.calibrator.done:
            self.trainer.should_stop = True
            for need, there in zip(self.needs, self.there, strict=True):
                told = "already in the store" if there else "gathered"
                self.tell(f"{need.component} {need.statistic}: {told} ({self.store.path(need.facts)})")
            for claim in self.claims:
                claim.release()
