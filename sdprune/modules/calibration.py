"""Calibration: gather what criteria need to know of the dense model's layer inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, List

import torch
from torch import Tensor

from sdprune.data import Batch
from sdprune.errors import InputError
from sdprune.modules.base import FrozenModule
from sdprune.pipelines import PipelineFamily, Sampling
from sdprune.pruning import find_targets, gather, merge
from sdprune.record import image_seed, own_version
from sdprune.store import StatisticsStore

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from sdprune.data import CocoDataModule


class Calibrator:
    """Gathers the input norms of every Linear layer of some components, batch by batch, into the store.

    Text encoders see the calibration prompts as in generation without guidance. Any other component is calibrated by
    drawing the prompts' images, all steps, with the guidance of generation; both halves of a guided batch count 1.

    Args:
        pipeline: the dense pipeline, loaded.
        facts: by component, what its statistics depend on; those in the store already are left out.
        sampling: how images are drawn.
        seed: of the noise.
    """

    def __init__(
        self, pipeline: PipelineFamily, facts: Mapping[str, Any], sampling: Sampling, seed: int, store: StatisticsStore
    ):
        self.pipeline, self.sampling, self.seed, self.store = pipeline, sampling, seed, store
        self.missing = {name: fact for name, fact in facts.items() if fact not in store}
        self.partials: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self.missing}
        self.samples = 0

    @torch.no_grad()
    def step(self, batch: Batch) -> None:
        """Run one batch of prompts; its sums are kept apart, under its index."""
        if not batch.valid or not self.missing:
            return
        self.samples += batch.valid
        texts = [name for name in self.missing if is_text(name)]
        others = [name for name in self.missing if not is_text(name)]
        for names, run in ((texts, self._encode), (others, self._draw)):
            if not names:
                continue
            with ExitStack() as stack:
                listeners = {
                    name: stack.enter_context(gather(find_targets(self.pipeline.components[name]))) for name in names
                }
                for listener in listeners.values():
                    listener.batch_size, listener.valid = len(batch.prompts), batch.valid
                run(batch)
                for name, listener in listeners.items():
                    sums = listener.take()
                    self.partials[name][batch.index] = {layer: value.cpu() for layer, value in sums.items()}

    def _encode(self, batch: Batch) -> None:
        self.pipeline.encode(batch.prompts)

    def _draw(self, batch: Batch) -> None:
        seeds = [image_seed(self.seed, f"calibration:{position}") for position in batch.positions]
        self.pipeline.generate(batch.prompts, seeds, self.sampling, decode=False)

    def finish(self, strategy: Strategy) -> None:
        """Bring together the sums of all processes, in the order of the batches, and save them; collective."""
        if not self.missing:
            return
        everyone = _gathered((self.partials, self.samples))
        samples = sum(count for _, count in everyone)
        for name, fact in self.missing.items():
            batches = {index: sums for partials, _ in everyone for index, sums in partials[name].items()}
            statistics = {"input_norm": merge(batches, samples)}
            if strategy.is_global_zero:
                self.store.save(fact, statistics)
        strategy.barrier("statistics")
        self.missing = {}

    def run(self, batches: Iterable[Batch], strategy: Strategy) -> None:
        """All of it, outside a training loop."""
        if self.missing:
            for batch in batches:
                self.step(batch)
            self.finish(strategy)


def is_text(component: str) -> bool:
    """Whether a component is a text encoder."""
    return component.startswith("text_encoder")


def calibration_facts(
    components: Iterable[str], pipeline: PipelineFamily, data: CocoDataModule, sampling: Sampling, seed: int, dtype: str
) -> dict[str, dict[str, Any]]:
    """By component, everything that its statistics depend on."""
    components = list(components)
    if not components:
        return {}
    common = {"version": own_version(), "pipeline": pipeline.describe(), "dtype": dtype}
    common["prompts"] = data.describe_calibration()
    drawn = {"sampling": sampling.describe(), "seed": seed}
    return {
        name: {"component": name, "statistics": ["input_norm"], **common, **({} if is_text(name) else drawn)}
        for name in components
    }


def _gathered(value: Any) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


class CalibrationModule(FrozenModule):
    """Fill the store with the dense model's statistics: `sdprune fit`.

    Args:
        pipeline: the model.
        components: what to calibrate, e.g. [text_encoder, unet].
        sampling: how images are drawn when the U-Net is calibrated.
        seed: of the noise.
        store: directory of the statistics.
    """

    def __init__(
        self,
        pipeline: PipelineFamily,
        components: List[str],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        store: str = "runs/statistics",
    ):
        super().__init__(pipeline)
        if not components:
            raise InputError("components is empty: name what to calibrate, as in [text_encoder, unet].")
        self.components, self.sampling, self.seed = components, sampling, seed
        self.store = StatisticsStore(store)

    def check(self, data: CocoDataModule, dtype: str) -> None:
        """Everything that can be told before the model is loaded."""
        self.pipeline.require(self.components)
        self.pipeline.check(self.sampling)
        _ = data.calibration_examples  # enough captions
        self.store.check(self._facts(data, dtype).values())

    def on_fit_start(self) -> None:
        """Load the model; what the store has already is not gathered again."""
        self.load()
        facts = self._facts(self.data, self.precision_name)
        self.calibrator = Calibrator(self.pipeline, facts, self.sampling, self.seed, self.store)

    def _facts(self, data: CocoDataModule, dtype: str) -> dict[str, dict[str, Any]]:
        return calibration_facts(self.components, self.pipeline, data, self.sampling, self.seed, dtype)

    def training_step(self, batch: Batch) -> None:
        """One batch of prompts."""
        self.calibrator.step(batch)

    def on_train_epoch_end(self) -> None:
        """Save."""
        gathered = list(self.calibrator.missing)
        self.calibrator.finish(self.trainer.strategy)
        for name in self.components:
            self.tell(f"{name}: {'gathered' if name in gathered else 'already in the store'} ({self.store.root})")
