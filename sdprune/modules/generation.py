"""Generation: prune in memory, draw an image for each prompt, score, and write the record."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import numpy as np
import torch

from sdprune.data import Batch
from sdprune.errors import InputError
from sdprune.identity import code_of, facts_of, package_code
from sdprune.metrics import PerImageMetric, share_extractors
from sdprune.modules.base import FrozenModule
from sdprune.modules.comparison import Comparison
from sdprune.modules.flaws import Flaws
from sdprune.modules.needs import Calibration
from sdprune.modules.pruning import PruningPlan, flat, summary
from sdprune.modules.references import References
from sdprune.pictures import grid
from sdprune.pipelines import PipelineFamily, Sampling
from sdprune.pruning import Budget, PruneReport, PruneSpec
from sdprune.record import (
    Picture,
    Record,
    clock,
    image_seed,
    label,
    read_png,
    save_png,
    versions,
)
from sdprune.tracking import summarize

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule

SAMPLES = ["A dog in a field", "A treehouse at night", "An ocean sunset", "The Eiffel Tower"]


class GenerationModule(FrozenModule):
    """Draw an image for every prompt, score them and write a record: `sdprune predict`.

    Pruning happens in memory before the first batch. Running the same command again goes on where it stopped.

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
        output: directory of all runs.
        store: directory of calibration statistics.
        budget: one sparsity for the whole model, which decides those of its components. One that cannot be met ends
            as a record that says so, with exit code 0, so that a sweep goes on.
    """

    def __init__(
        self,
        pipeline: PipelineFamily,
        prune: Dict[str, PruneSpec],
        metrics: List[PerImageMetric],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        calibration: Calibration = Calibration(),  # noqa: B008
        seed: int = 0,
        samples: List[str] = SAMPLES,
        compare_dense: bool = True,
        output: str = "runs",
        store: str = "runs/statistics",
        budget: Optional[Budget] = None,
    ):
        super().__init__(pipeline)
        names = [metric.name for metric in metrics]
        if len(set(names)) < len(names):
            raise InputError(f"Two metrics share a name among {names}: set `name` of one.")
        self.plan = PruningPlan(pipeline, prune, sampling, calibration, seed, store, budget)
        self.sampling, self.seed, self.samples = sampling, seed, list(samples)
        self.compare_dense, self.output = compare_dense, output
        if self.plan.wanted and not compare_dense:
            metrics = [metric for metric in metrics if not metric.needs_dense]
        self._metrics = list(metrics)  # a plain list: as submodules they would be cast by precision plugins
        self._extractors = share_extractors(metrics)
        self._flaws = Flaws()
        self.references = References(metrics, output)
        self.reports: dict[str, PruneReport] = {}
        self.baseline: Record | None = None
        self.facts_of_data: dict[str, int] = {}
        self.finished = False

    def dense(self) -> GenerationModule:
        """The same run without pruning, sharing pipeline and metrics."""
        return GenerationModule(
            self.pipeline, {}, self._metrics, self.sampling, seed=self.seed, samples=self.samples, compare_dense=False,
            output=self.output, store=str(self.plan.store.root),
        )  # fmt: skip

    @property
    def wants_dense(self) -> bool:
        """Whether this run is compared with a dense one."""
        return self.compare_dense and self.plan.wanted and self.plan.infeasible is None

    @property
    def calibrates(self) -> bool:  # noqa: D102
        return self.plan.calibrates

    @property
    def numbers(self) -> list[str]:
        """Names of the results' numbers, as W&B has them; one that ends with a slash stands for all that begin so."""
        names = ["sparsity/", "images/", "speed/"]
        compared = self.compare_dense and self.plan.wanted
        for metric in self._metrics:
            scores, differences = metric.titles if not code_of(metric) else ([""], [""])  # a user's may have any
            names += [f"metrics/{name}" for name in scores]
            names += [f"comparison/{name}" for name in differences if compared]
        return names

    def prepare_record(self, data: CocoDataModule, precision: str) -> Record:
        """The run's directory, from everything that decides its results."""
        if self.plan.infeasible is not None:
            return self._infeasible_record()
        facts = {
            "version": package_code(),
            "pipeline": facts_of(self.plan.pipeline),
            "dtype": precision,
            "prune": self.plan.describe(),
            "calibration": self.plan.facts(data, precision),
            "data": data.describe(reference=bool(self.references.metrics)),
            "sampling": self.sampling.describe(),
            "seed": self.seed,
            "metrics": [facts_of(metric) for metric in self._metrics],
            "samples": self.samples,
        }
        self.record = Record(self.output, label(self.plan.specs), facts)
        return self.record

    def directory(self, data: CocoDataModule, dtype: str) -> Path:
        """The record's; needs `prepare_record`."""
        return self.record.directory

    def record_infeasible(self, reason: str) -> Record:
        """A record that says why the budget cannot be met; nothing is drawn."""
        self.record = self._infeasible_record()
        if not self.record.finished:
            self.record.start()
            told = {"label": self.record.directory.name, "n": 0, "infeasible": reason}
            told |= {"budget": self.record.facts["budget"], "speed": {"finished": clock(time.time())}}
            self.record.finish(told)
        return self.record

    def _infeasible_record(self) -> Record:
        budget = {} if self.plan.budget is None else self.plan.budget.describe()
        specs = {name: spec.describe() for name, spec in self.plan.asked.items()}
        facts = {"version": package_code(), "pipeline": facts_of(self.plan.pipeline), "budget": budget, "prune": specs}
        return Record(self.output, f"infeasible-{budget['total']:g}-{budget['text_share']:g}", facts)

    def check(self, data: CocoDataModule, dtype: str) -> None:
        """Everything that can be told before the model is loaded; needs `prepare_record`."""
        self.plan.check(data, dtype)
        for metric in self._metrics:
            if data.n < metric.minimum:
                name = metric.name or type(metric).__name__
                raise InputError(f"{name} needs at least {metric.minimum} images, and n is {data.n}: leave it out.")
        self.record.check(data.examples["file_name"])
        images = self.references.check(data)
        self.facts_of_data = data.check(calibration=self.calibrates, images=images)

    def setup(self, stage: str) -> None:
        """See whether the record is there, or wait while another run makes it; all processes decide alike."""
        self._parent = os.getppid()
        self._claim = self.claim(self.output, self.record.directory.name)
        self.finished = not self._claim.acquire(lambda: self.record.finished)
        if self._claim.first and not self.finished:
            self.record.tidy()

    def teardown(self, stage: str) -> None:
        """Let other runs have the record."""
        self._claim.release()

    def on_predict_start(self) -> None:
        """Load, calibrate what is missing, prune, and load the metrics."""
        if self.finished:
            return
        self.started = time.perf_counter()
        self.load()
        self.facts_of_data["truncated"] = self.data.count_truncated(self.pipeline.tokenizer)
        device = self.trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._calibrate()
        self.reports = self.plan.apply(self.data, self.precision_name)
        self.sparsity = self.plan.account(self.reports)
        for metric in self._metrics:
            metric.reset()
            metric.prepare(device)
        self._flaws.reset()
        self._flaws.to(device)
        claim = partial(self.claim, self.output)
        self.references.set(self.data, claim)  # before anything is drawn: it may find fault with them
        self.generated = 0
        self.seconds = {
            "preparation": time.perf_counter() - self.started,
            "generation": 0.0,
            "files": 0.0,
            "scoring": 0.0,
        }

    def _calibrate(self) -> None:
        """Fill the store with what pruning needs; a run that needs the same waits for this one."""
        data, precision = self.data, self.precision_name
        claims = self.claim_statistics(self.plan.store, self.plan.needs(data, precision))
        if not claims:  # then no captions need be there
            return
        calibrator = self.plan.calibrator(data, precision)  # of what is missing now
        if not calibrator.done:
            calibrator.watch.start(self.on_calibration, data.calibration_n, data.calibration_batch_size)
            batches = partial(data.calibration_loader, self.global_rank, self.trainer.world_size)
            calibrator.run(batches, self.trainer.strategy)
        for claim in claims:
            claim.release()

    def predict_step(self, batch: Batch) -> list[int]:
        """Draw a batch's images, or read them if an earlier attempt wrote them all; score them either way."""
        if self.finished:
            return []
        if self.global_rank and os.getppid() != self._parent:
            raise RuntimeError("The process that started this one has died.")
        drawn = self._draw(batch)
        start = time.perf_counter()
        images = _stacked(drawn).to(self.trainer.strategy.root_device)
        prompts, positions = batch.prompts[: batch.valid], batch.positions[: batch.valid]
        features = {key: extractor(images) for key, extractor in self._extractors.items()}
        dense = None
        if self.baseline is not None and any(metric.needs_dense for metric in self._metrics):
            dense = _stacked([read_png(path) for path in self._paths(self.baseline, batch)])
        for metric in self._metrics:
            own = None if metric.extractor is None else features[metric.extractor.key]
            metric.update(images, prompts, positions, own, dense)
        self._flaws.update(images, [one.finite for one in drawn], [one.digest for one in drawn], positions)
        self.seconds["scoring"] += time.perf_counter() - start
        return batch.ids[: batch.valid]

    def _draw(self, batch: Batch) -> list[Picture]:
        """The batch's images as they lie in their files."""
        paths = self._paths(self.record, batch)
        start = time.perf_counter()
        drawn = None
        if not all(path.exists() for path in paths):
            seeds = [image_seed(self.seed, image_id) for image_id in batch.ids]
            drawn = self.pipeline.generate(batch.prompts, seeds, self.sampling)
        middle = time.perf_counter()
        for path, image, good in zip(paths, *drawn, strict=False) if drawn is not None else ():
            if not path.exists():
                save_png(path, image.permute(1, 2, 0).numpy(), good)
                self.generated += 1
        found = [read_png(path) for path in paths]  # what is scored is what lies there
        self.seconds["generation"] += middle - start
        self.seconds["files"] += time.perf_counter() - middle
        return found

    @staticmethod
    def _paths(record: Record, batch: Batch) -> list[Path]:
        return [record.image_path(name) for name in batch.file_names[: batch.valid]]

    def on_predict_epoch_end(self) -> None:
        """Gather what was measured, compute the scores; the first process writes the record."""
        if self.finished:
            return
        for metric in (*self._metrics, self._flaws):
            metric.gather()
        scores, strategy = self._scores(), self.trainer.strategy
        generated = strategy.reduce(torch.tensor(self.generated, device=strategy.root_device), reduce_op="sum")
        if self.trainer.is_global_zero:
            self._write(scores, int(generated))
        strategy.barrier("record")

    def _scores(self) -> dict[str, float]:
        """Of all metrics, which the processes share among themselves; collective."""
        processes = min(self.trainer.world_size, len(self._metrics))
        numbers = range(self.global_rank, len(self._metrics), processes) if self.global_rank < processes else ()
        computed = {number: self._metrics[number].compute() for number in numbers}
        for source in range(processes):
            computed |= self.trainer.strategy.broadcast(computed, src=source)
        return {name: value for number in sorted(computed) for name, value in computed[number].items()}

    def _write(self, scores: dict[str, float], generated: int) -> None:
        ids = list(self.data.examples["id"])
        rows: dict[str, np.ndarray] = {}
        for metric in (*self._metrics, self._flaws):
            rows |= {key: metric.rows()[column].numpy() for column, key in metric.keys().items()}
        self.record.save_rows(ids, rows)
        self._draw_samples()
        seconds = time.perf_counter() - self.started
        busy = sum(self.seconds[name] for name in ("generation", "files", "scoring"))
        results = {
            "fingerprint": self.record.fingerprint,
            "label": self.record.directory.name,
            "model": self.pipeline.name,
            "n": len(ids),
            "metrics": scores,
            "remarks": [remark for metric in self._metrics for remark in metric.remarks(scores)],
            "comparison": {},  # of `compare`, later
            "verdicts": {},
            "images": self._flaws.told(ids),
            "budget": None if self.plan.budget is None else self.plan.budget.describe(),
            "sparsity": self.sparsity,
            "pruning": summary(self.reports),
            "data": self.facts_of_data,
            "protocols": self._protocols(),
            "speed": {
                "seconds": seconds,
                "finished": clock(time.time()),
                **{f"{name}_seconds": value for name, value in self.seconds.items()},
                "generated": generated,
                "images_per_second": generated / busy if generated else 0.0,
                "processes": self.trainer.world_size,
                "peak_memory_bytes": peak_memory(self.trainer.strategy.root_device),
            },
            "device": str(self.trainer.strategy.root_device.type),
            "versions": versions(),
        }
        self.record.finish(results)

    def _protocols(self) -> dict[str, Any]:
        """By metric, how it was measured: n, the network and its protocol, and the reference."""
        references = self.references.describe(self.data)
        told: dict[str, Any] = {}
        for metric in self._metrics:
            network = {} if metric.extractor is None else {"protocol": metric.extractor.name}
            reference = {"reference": references[metric.name]} if metric.name in references else {}
            told[metric.name or type(metric).__name__] = {
                **metric.describe(), **network, "n": len(self.data.examples), **reference
            }  # fmt: skip
        return told

    def _draw_samples(self) -> None:
        if not self.samples:
            return
        seeds = [image_seed(self.seed, f"sample:{prompt}") for prompt in self.samples]
        drawn = self.pipeline.generate(self.samples, seeds, self.sampling)
        images = drawn.images.permute(0, 2, 3, 1).numpy()
        for number, (image, finite) in enumerate(zip(images, drawn.finite, strict=True)):
            save_png(self.record.directory / "samples" / f"{number}.png", image, finite)
        rows = {"pruned" if self.plan.specs else "dense": list(images)}
        if self.baseline is not None:
            folder = self.baseline.directory / "samples"
            rows = {"dense": [read_png(folder / f"{i}.png").pixels for i in range(len(images))], **rows}
        save_png(self.record.directory / "grid.png", grid(rows, self.samples))

    def compare(self) -> None:
        """Compare the finished record with the dense one's, unless that was done in the very same way.

        On the first process, when the others are gone: however long it takes, nobody waits in a collective. Whoever is
        killed here leaves a finished record without a comparison, which the same command adds.
        """
        if self.baseline is None:
            return
        comparison = Comparison(self._metrics, self.record, self.baseline)
        claim = self.claim(self.output, self.record.directory.name)
        if not claim.acquire(lambda: comparison.done):
            return
        if self.finished:
            self._load_metrics()
        self.record.finish({**self.record.results, **comparison.make()})
        claim.release()

    def _load_metrics(self) -> None:
        """Give the metrics the record's rows and their references."""
        self.references.set(self.data, partial(self.claim, self.output))
        for metric in self._metrics:
            metric.to(self.trainer.strategy.root_device)
            metric.load_rows({k: torch.from_numpy(v) for k, v in self.record.load_rows(metric.keys()).items()})

    def log_record(self) -> None:
        """The finished record's numbers and grid, to every logger; those of the dense run under `dense/`.

        Read from the records, so that a run says the same whether it drew its images or found them finished.
        """
        numbers = _numbers(self.record.results)
        facts = {"record": self.record.facts, "directory": self.record.directory.name, "model": self.pipeline.name}
        verdicts = {f"verdicts/{name}": one["verdict"] for name, one in self.record.results.get("verdicts", {}).items()}
        if self.baseline is not None:
            numbers |= {f"dense/{key}": value for key, value in _numbers(self.baseline.results).items()}
            facts["dense_directory"] = self.baseline.directory.name
        picture = self.record.directory / "grid.png"
        for logger in self.trainer.loggers:
            logger.log_hyperparams(facts)
            logger.log_metrics(numbers, step=0)
            summarize(logger, verdicts)
            if hasattr(logger, "log_image") and picture.exists():
                logger.log_image("samples", [str(picture)], step=0)
            logger.save()


def _stacked(pictures: Sequence[Picture]) -> torch.Tensor:
    """uint8 [b, 3, h, w]."""
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    if "infeasible" in results:
        return {"infeasible": 1.0}
    return flat({key: results[key] for key in ("metrics", "comparison", "images", "sparsity", "speed")})


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
