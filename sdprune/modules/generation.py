"""Generation: prune in memory, draw an image for each prompt, and score them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional

import numpy as np
import torch
from lightning import Callback

from sdprune.calibration.settings import Calibration
from sdprune.data import Batch
from sdprune.errors import InputError
from sdprune.locks import RunLock
from sdprune.metrics import ImageScores, Score
from sdprune.modules.base import FrozenModule
from sdprune.modules.pruning_options import PruningOptions
from sdprune.modules.pruning_plan import PruningPlan
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pipelines.sampling import image_seed
from sdprune.processes import Processes
from sdprune.pruning import Budget, PruneReport, PruneSpec
from sdprune.pruning.narrowing import NarrowReport, NarrowSpec
from sdprune.runs.comparison import Comparison, require_comparable
from sdprune.runs.infeasible import infeasible_record
from sdprune.runs.invalid_images import InvalidImages
from sdprune.runs.png import Picture, read_png, save_png, stacked
from sdprune.runs.record import Record
from sdprune.runs.record_writer import RecordWriter
from sdprune.runs.references import References
from sdprune.runs.sample_grid import SampleGrid
from sdprune.runs.scoring import Scoring

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule

SAMPLES = ["A dog in a field", "A treehouse at night", "An ocean sunset", "The Eiffel Tower"]


class DrawingModule(FrozenModule):
    """Draws pictures into a record.

    Args:
        pipeline: the model.
        sampling: how images are drawn.
        seed: every image's noise comes from this and its id.
    """

    record: Record

    def __init__(self, pipeline: DiffusersFamily, sampling: Sampling, seed: int) -> None:
        super().__init__(pipeline)
        self.sampling, self.seed = sampling, seed
        self.seconds = {"preparation": 0.0, "generation": 0.0, "files": 0.0, "scoring": 0.0}
        self.generated = 0
        """How many pictures this process has drawn."""

    def pictures(self, batch: Batch, paths: Sequence[Path]) -> list[Picture]:
        """A batch's pictures as they lie in their files; those that are missing are drawn first."""
        if not all(path.exists() for path in paths):
            with self.timing("generation"):
                drawn = self.draw(batch.prompts, batch.ids)
            with self.timing("files"):
                for path, picture in zip(paths, drawn, strict=False):
                    if not path.exists():
                        save_png(path, *picture)
                        self.generated += 1
        with self.timing("files"):
            return [read_png(path) for path in paths]  # what is scored is what lies there

    def draw(self, prompts: Sequence[str], ids: Sequence[object]) -> list[tuple[np.ndarray, bool]]:
        """Pictures, uint8 [h, w, 3], from noise that the run's seed and the ids decide, and whether each is finite."""
        seeds = [image_seed(self.seed, one) for one in ids]
        with self.trainer.precision_plugin.forward_context():
            drawn = self.pipeline.generate(prompts, seeds, self.sampling)
        return list(zip(drawn.images.permute(0, 2, 3, 1).numpy(), drawn.finite, strict=True))

    def draw_samples(self, prompts: Sequence[str]) -> list[tuple[np.ndarray, bool]]:
        """Pictures of prompts that are no captions of the data, as of `draw`; the noise hangs on the prompt's words."""
        return self.draw(prompts, [f"sample:{prompt}" for prompt in prompts])

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the seconds that a block takes to the record's account."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


class GenerationModule(DrawingModule):
    """Draw an image for every prompt, score them and write a record: `sdprune predict`.

    Pruning happens in memory before the first batch. Running the same command again goes on where it stopped; with
    more metrics or other samples it adds these to the record, and pictures that lie there are not drawn again.

    Args:
        pipeline: the model.
        prune: how, by component: `--model.prune.unet.sparsity=0.35`; sparsity 0 everywhere is the dense model.
        metrics: scores to compute.
        sampling: how images are drawn.
        calibration: what counts when a criterion needs calibration, and how much memory it may take.
        seed: every image's noise comes from this and its id.
        samples: prompts of the sample grid.
        compare_dense: when something is pruned, draw the dense model's images too, unless that record is there
            already, and report paired differences. Without, metrics that measure nothing else are left out.
        baseline: what to compare with instead of the dense model: the directory of a finished run, or another model of
            the same family (a diffusers directory or a hub id), which is then drawn unpruned from the same noise.
        output: directory of all runs.
        store: directory of calibration statistics.
        budget: one sparsity for the whole model, which decides those of its components. One that cannot be met ends
            as a record that says so, with exit code 0, so that a sweep goes on.
        narrow: by component, what is removed before weights are pruned, so that the model is smaller and faster:
            `--model.narrow.unet.channels=0.4`.
    """

    def __init__(
        self,
        pipeline: DiffusersFamily,
        prune: Dict[str, PruneSpec],
        metrics: List[Score],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        calibration: Calibration = Calibration(),  # noqa: B008
        seed: int = 0,
        samples: List[str] = SAMPLES,
        compare_dense: bool = True,
        output: str = "runs",
        store: str = "runs/statistics",
        budget: Optional[Budget] = None,
        baseline: Optional[str] = None,
        narrow: Dict[str, NarrowSpec] = {},  # noqa: B006 (not changed)
    ):
        super().__init__(pipeline, sampling, seed)
        self.options = PruningOptions(prune, sampling, calibration, seed, store, budget, narrow)
        self.samples, self.output = list(samples), output
        self.compares = compare_dense and (self.options.wanted or baseline is not None)
        """Whether this run is compared with another one."""
        if self.options.wanted and not self.compares:
            metrics = [score for score in metrics if not any(column.needs_dense for column in score.columns)]
        self._scores = [ImageScores(metrics)]  # in a list: as a submodule the trainer would move and cast it
        self.references = References(self.scores, output)
        self.given_baseline = baseline
        self.baseline: Record | None = None
        """The finished record that this run is compared with."""
        self.plan: PruningPlan | None = None
        self.reports: dict[str, PruneReport] = {}
        self.narrowed: dict[str, NarrowReport] = {}
        self.todo: frozenset[str] = frozenset()
        """What the record lacks of `images`, `samples` and `scores`."""
        self.facts_of_data: dict[str, int] = {}

    @property
    def scores(self) -> ImageScores:
        """All scores of the run, and what they read of the images."""
        return self._scores[0]

    @property
    def calibrates(self) -> bool:
        """Whether calibration captions are needed."""
        return self.options.calibrates

    def find_baseline(self) -> GenerationModule | Record | None:
        """What this run is compared with: a finished record, or a run without pruning that draws it.

        The latter is of the baseline's model if one is given, else of this one's; networks that measure are shared.
        """
        if not self.compares:
            return None
        pipeline = self.pipeline
        if self.given_baseline is not None:
            if (Path(self.given_baseline) / "results.json").exists():
                found = Record.at(Path(self.given_baseline))
                require_comparable(self.record, found, same_model=False)  # before anything is drawn
                return found
            pipeline = type(pipeline)(self.given_baseline)
            pipeline.placement = self.pipeline.placement
        return GenerationModule(
            pipeline, {}, self.scores.scores, self.sampling, seed=self.seed, samples=self.samples,
            compare_dense=False, output=self.output, store=self.options.store,
        )  # fmt: skip

    def _finished_baseline(self) -> Record:
        """The record that this run is compared with, which has to be there."""
        found = self.find_baseline()
        if isinstance(found, GenerationModule):
            found.resolve(self.data, self.precision_name)
            found = found.record
        assert found is not None
        if not found.finished:
            raise InputError(
                f"{found.directory}, which this run is compared with, is not drawn yet: run the trainer's predict with "
                "find_baseline() of the module first, or give compare_dense=False."
            )
        return found

    def resolve(self, data: CocoDataModule, dtype: str) -> None:  # noqa: D102
        if self.plan is not None:
            return
        self.plan = self.options.resolve(self.pipeline, data, dtype)
        drawn = {"data": data.describe(), "sampling": self.sampling.describe(), "seed": self.seed}
        name = self.plan.label("dense" if self.given_baseline is None else self.pipeline.name)
        self.record = Record(self.output, name, {**self.plan.describe(), **drawn})
        self.scoring = Scoring(self.scores, self.record, data)

    def directory(self) -> Path:
        """The directory of the record."""
        return self.record.directory

    def check(self, data: CocoDataModule) -> None:
        """Everything that can be found wrong before the model is loaded, once the run is resolved."""
        assert self.plan is not None
        self.pipeline.check(self.sampling)
        self.plan.check(data)
        self.scores.check(data.examples["caption"])
        self.record.check(data.examples["file_name"])
        images = self.references.check(data)
        self.facts_of_data = data.check(calibration=self.calibrates, images=images)

    def infeasible_record(self) -> Record:
        """The record of a budget that cannot be met."""
        assert self.options.budget is not None
        return infeasible_record(self.output, self.pipeline, self.options.budget, self.options.prune)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Those that write the sample grid and the record."""
        return [SampleGrid(), RecordWriter()]

    def setup(self, stage: str) -> None:
        """See what the record lacks, or wait while another run makes it; all processes decide alike."""
        self.data.passes = None
        self.require_all_batches()
        self.resolve(self.data, self.precision_name)
        if self.compares and self.baseline is None:
            self.baseline = self._finished_baseline()
        self.scoring.baseline = self.baseline
        if not self.facts_of_data:  # the command line has checked before it began
            self.check(self.data)
        self._parent = os.getppid()
        self._lock = RunLock(self.output, self.record.directory.name)
        mine = self._lock.acquire(lambda: not self.scoring.missing(self.samples))
        missing = self.scoring.missing(self.samples) if mine and self.trainer.is_global_zero else []
        self.todo = frozenset(Processes().broadcast(missing))
        if "scores" in self.todo:
            self.scoring.begin("images" in self.todo)
        if "images" in self.todo and self.trainer.is_global_zero:
            self.record.start()
            self.record.tidy()
            self.record.adopt(self.data.examples["file_name"])
        Processes().barrier()

    def teardown(self, stage: str) -> None:
        """Let other runs have the record, and compare it. With several processes the command line does that later."""
        self._lock.release()
        if self.trainer.world_size == 1:
            self.compare()

    def on_predict_start(self) -> None:
        """Load, calibrate what is missing, prune, and load the networks that measure."""
        device = self.trainer.strategy.root_device
        self.seconds, self.generated = dict.fromkeys(self.seconds, 0.0), 0
        with self.timing("preparation"):
            if self.todo & {"images", "samples"}:
                self._prepare_pipeline(device)
            self.invalid = InvalidImages().to(device)
            if "scores" in self.todo:
                self.scoring.prepare(device)
                self.references.set(self.data)  # before anything is drawn: it may find fault with them

    def _prepare_pipeline(self, device: torch.device) -> None:
        assert self.plan is not None
        self.load()
        self.facts_of_data["truncated"] = self.data.count_truncated(self.pipeline.tokenizers["tokenizer"])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.narrowed = self.narrow(self.plan)
        self.gather(self.plan.calibration)
        self.reports = self.plan.apply()

    def predict_step(self, batch: Batch) -> list[int]:
        """Draw a batch's images, or read them if they lie there; score them either way.

        Returns:
            The ids of the images: the trainer keeps what is returned.
        """
        if self.global_rank and os.getppid() != self._parent:
            raise RuntimeError("The process that started this one has died.")
        if "images" not in self.todo and not self.scoring.keys:
            return []
        pictures = self.pictures(batch, self.record.image_paths(batch))
        with self.timing("scoring"):
            dense = None
            if self.baseline is not None and self.scoring.reads_dense:
                dense = stacked([read_png(path) for path in self.baseline.image_paths(batch)])
            images = stacked(pictures)
            self.scoring.update(batch, images, dense)
            self.invalid.update(images, pictures, batch.positions[: batch.valid])
        return batch.ids[: batch.valid]

    def on_predict_epoch_end(self) -> None:
        """Gather what was measured, and compute the scores; collective."""
        if "images" in self.todo:
            self.invalid.gather()
        self.values = self.scoring.compute() if "scores" in self.todo else {}

    def compare(self) -> None:
        """Compare the finished record with its baseline, unless that was done in the very same way.

        Only on the first process, so that no other one waits in a collective. A run that is killed here leaves a
        finished record without a comparison, which the same command adds.
        """
        if self.baseline is None or not self.trainer.is_global_zero:
            return
        comparison = Comparison(self.record, self.baseline, self.scores, self.given_baseline is None)
        lock = RunLock(self.output, self.record.directory.name, Processes(alone=True))
        with lock.making(lambda: comparison.done) as mine:
            if mine:
                self.references.set(self.data, lock.processes)
                self.scores.to(self.trainer.strategy.root_device)
                comparison.write()
