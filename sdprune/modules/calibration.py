"""Calibration alone: fill the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, List

from sdprune.calibration.settings import Calibration
from sdprune.errors import InputError
from sdprune.modules.base import CalibratingModule
from sdprune.modules.calibration_plan import CalibrationPlan
from sdprune.modules.pruning_options import PruningOptions
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pruning import PruneSpec, find_targets, statistic_names
from sdprune.pruning.statistics import InputStatistic, statistic_class
from sdprune.pruning.timesteps import Timesteps
from sdprune.schema import class_named

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class CalibrationModule(CalibratingModule):
    """Fill the store with the dense model's statistics: `sdprune fit`. Pruning finds them there.

    Args:
        pipeline: the model.
        components: what to calibrate, e.g. [text_encoder, unet].
        statistics: what to gather: input_norm (Wanda, OWL), hessian (SparseGPT), or the dotted path of a class of your
            own.
        layers: kinds of layer: Linear, Conv2d.
        timesteps: how much denoising steps count in Hessians: uniform, linear, log_decrease, log_increase. Input norms
            are kept by step and weighted afterwards.
        sampling: how images are drawn when the U-Net is calibrated.
        calibration: what counts, and how much memory Hessians may take.
        seed: of the noise.
        store: directory of the statistics.
    """

    calibrates = True

    def __init__(
        self,
        pipeline: DiffusersFamily,
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
            raise InputError(f"statistics is empty: choose from {', '.join(statistic_names())}.")
        self.components, self.statistics = components, [_statistic(name) for name in statistics]
        self.spec = PruneSpec(layers=list(layers), timesteps=timesteps)
        self.options = PruningOptions({}, sampling, calibration, seed, store)

    def resolve(self, data: CocoDataModule, dtype: str) -> None:  # noqa: D102
        if hasattr(self, "calibration"):
            return
        self.pipeline.require(self.components)
        for component in self.components:
            find_targets(self.pipeline.meta_module(component), self.spec.layers)
        plan = self.options.resolve(self.pipeline, data, dtype)
        requests = self.options.requests(self.pipeline, data, dtype)
        wanted = [one for name in self.components for one in requests.of_model(name, self.statistics, self.spec)]
        self.calibration = CalibrationPlan(
            requests.subjects, tuple(wanted), plan.calibration.store, self.options.calibration
        )
        self.pipeline.check(self.options.sampling)
        self.calibration.check(data)

    def directory(self) -> None:
        """None: the statistics lie in the store."""

    def setup(self, stage: str) -> None:  # noqa: D102
        self.resolve(self.data, self.precision_name)
        self._there = [one.facts in self.calibration.store for one in self.calibration.requests]
        super().setup(stage)

    def finish(self) -> None:
        """Say what was gathered and what was there already."""
        for one, there in zip(self.calibration.requests, self._there, strict=True):
            state = "already in the store" if there else "gathered"
            self.say(f"{one.component} {one.statistic}: {state} ({self.calibration.store.path(one.facts)})")


def _statistic(name: str) -> str:
    """The name of a statistic that is given by its name, or by the dotted path of its class."""
    if "." not in name:
        return statistic_class(name).name
    cls = class_named("model.statistics", name, [InputStatistic])
    if statistic_class(cls.name) is not cls:
        raise InputError(f"--model.statistics is {name}, whose name {cls.name!r} is another one's: give it its own.")
    return str(cls.name)
