"""The search as a LightningModule: draws what the search wants next, in one predict loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from sdprune.calibration.settings import Calibration
from sdprune.data import Batch
from sdprune.data.batches import FILLER, Batches
from sdprune.errors import InputError
from sdprune.identity import SCORING, facts_of, package_code
from sdprune.locks import RunLock
from sdprune.metrics import Column, ImageBatch, Score
from sdprune.modules.generation import DrawingModule
from sdprune.modules.pruning_options import PruningOptions
from sdprune.modules.pruning_plan import PruningPlan
from sdprune.modules.weights import Weights
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.processes import Processes
from sdprune.pruning import Budget, InfeasibleError, PruneSpec
from sdprune.runs.png import Picture, stacked
from sdprune.runs.record import Record
from sdprune.search.answer import write_answer
from sdprune.search.certificate import ALPHA, FIRST, Bisection, Tolerance, fewest
from sdprune.search.files import read_state, write_state
from sdprune.search.options import Levels, check_path, check_spec, model_of, number_of
from sdprune.search.search import CERTIFICATE, DENSE, SCALE, SEARCH, Model, Search

if TYPE_CHECKING:
    from sdprune.data import CocoDataModule


class Work:
    """A batch of prompts that a model draws; an empty one where other processes have something to do.

    No tuple and no dataclass: the trainer would take it apart, and look for tensors.
    """

    def __init__(self, model: Model, part: str, batch: Batch) -> None:
        self.model, self.part, self.batch = model, part, batch


class SearchModule(DrawingModule):
    """Find and certify the sparsest model whose images are as good as the dense model's: `sdprune search`.

    Each component of `prune` is searched by itself, by bisection over the levels, and then all together, back from
    their thresholds by equal steps. The test of a level draws images until it can decide, `--data.n` at most. The same
    command again goes on where it stopped.

    Args:
        pipeline: the model.
        prune: the components that are searched and how they are pruned, without sparsities:
            `--model.prune.unet.criterion=Wanda`.
        score: the metric whose loss is tested. It needs a number for each image.
        scored: which of its numbers, where it has several.
        tolerance: how much of the dense model's score may be lost, in the mean over prompts.
        absolute: whether the tolerance is in units of the score instead of a share.
        levels: the sparsities that are tried.
        path: sparsities of the components, ascending, as in [{text_encoder: 0.3, unet: 0.2}, ...], to be searched
            instead.
        also: sparsities by component of one more model, which is tested on the same prompts as the answer.
        sampling: how images are drawn.
        calibration: what counts when a criterion needs calibration, and how much memory it may take.
        seed: every image's noise comes from this and its id.
        output: directory of all runs.
        store: directory of calibration statistics.
        budget: searches its totals instead, one sparsity for the whole model; the total given with it does not matter.
    """

    def __init__(
        self,
        pipeline: DiffusersFamily,
        prune: Dict[str, PruneSpec],
        score: Score,
        scored: Optional[str] = None,
        tolerance: float = 0.02,
        absolute: bool = False,
        levels: Levels = Levels(),  # noqa: B008 (frozen)
        path: Optional[List[Dict[str, float]]] = None,
        also: Dict[str, float] = {},  # noqa: B006 (not changed)
        sampling: Sampling = Sampling(),  # noqa: B008
        calibration: Calibration = Calibration(),  # noqa: B008
        seed: int = 0,
        output: str = "runs",
        store: str = "runs/statistics",
        budget: Optional[Budget] = None,
    ):
        super().__init__(pipeline, sampling, seed)
        self.prune, self.budget, self.levels, self.output = dict(prune), budget, levels, output
        self.options = PruningOptions({}, sampling, calibration, seed, store)
        self.score, self.scored, higher = score, *number_of(score, scored)
        self.tolerance = Tolerance(tolerance, not absolute, higher)
        if not absolute and any(column.needs_dense for column in score.columns):
            raise InputError(
                f"absolute is false, and {self.scored} is a distance to the dense model's image, which has none of its "
                "own: give a distance that is tolerated and --model.absolute=true."
            )
        for name, spec in self.prune.items():
            check_spec(name, spec)
        self.given_path = [model_of(f"path[{number}]", one) for number, one in enumerate(path or [])]
        self.also = model_of("also", also) if also else None
        self._check_path()
        self.search: Search | None = None
        self.facts_of_models: dict[str, Any] = {}
        """What pruning came to, by the name of the model."""
        self._weights: Weights[Model] | None = None

    def _check_path(self) -> None:
        if not self.prune and self.budget is None:
            raise InputError("prune is {}: there is nothing to search; name components, as in {unet: {}}.")
        check_path(self.given_path)
        if self.given_path and self.budget is not None:
            raise InputError("path and budget exclude each other: leave one of them out.")
        given = [("path", "[]", model) for model in self.given_path]
        given += [("also", "{}", self.also)] if self.also else []
        for option, nothing, model in given:
            if self.budget is None and (extra := sorted({*model.sparsities} - {*self.prune})):
                raise InputError(
                    f"{option} names {extra[0]!r}, which prune does not: add --model.prune.{extra[0]}={{}}, or leave "
                    f"it out, as in --model.{option}={nothing}."
                )

    @property
    def calibrates(self) -> bool:
        """Whether calibration captions are needed."""
        specs = self.prune.values() if self.prune else [PruneSpec()]
        measured = self.budget is not None and self.budget.measured
        return measured or any(spec.criterion.statistics or spec.allocation.statistics for spec in specs)

    # --- before anything is loaded ---------------------------------------------------------------------------------

    def resolve(self, data: CocoDataModule, dtype: str) -> None:  # noqa: D102
        if self.search is not None:
            return
        self.pipeline.require([*self.prune])
        self.pipeline.check(self.sampling)
        paths = self._paths(data, dtype)
        first = self._plan(next(iter(paths.values()))[0], data, dtype)
        for models in paths.values():
            self._plan(models[-1], data, dtype).check(data)
        prompts = self._cut(data)
        for rows in prompts.values():
            self.score.check_prompts(rows["caption"])
        self.parts = {part: Batches(rows, data.batch_size) for part, rows in prompts.items()}
        self.search = Search(self.tolerance, paths, data.n, bool(self.given_path or self.budget), self.also)
        least = fewest(ALPHA / max(Bisection.depth(len(models)) for models in paths.values()))
        if data.n < least:
            raise InputError(f"--data.n={data.n} is too small: images without any loss take {least} to certify that.")
        described = data.describe()
        facts = {
            **first.describe(),
            "prune": {name: {**spec.describe(), "sparsity": None} for name, spec in sorted(self.prune.items())},
            "budget": None if self.budget is None else {**self.budget.describe(), "total": None},
            "paths": {name: [model.name for model in models] for name, models in paths.items()},
            "also": None if self.also is None else self.also.name,
            "tolerance": [self.tolerance.value, self.tolerance.relative],
            "score": {**facts_of(self.score), "scored": self.scored, "code": package_code(*SCORING, "search")},
            "data": {name: described[name] for name in ("source", "n", "seed", "batch_size")},
            "sampling": self.sampling.describe(),
            "seed": self.seed,
        }
        name = "-".join(["search", *(self.prune if self.budget is None else ["budget"]), self.scored])
        self.record = Record(self.output, f"{name}-{self.tolerance.value:g}", facts)

    def directory(self) -> Path:
        """The directory of the search."""
        return self.record.directory

    def _paths(self, data: CocoDataModule, dtype: str) -> dict[str, list[Model]]:
        if self.given_path:
            return {"path": self.given_path}
        values = self.levels.values()
        if self.budget is None:
            return {name: [Model({name: share}) for share in values] for name in self.prune}
        feasible = []
        for total in values:
            try:
                self._plan(model := Model(total=total), data, dtype)
            except InfeasibleError:
                break
            feasible.append(model)
        if not feasible:
            raise InputError(f"--model.levels.low is {self.levels.low:g}: no such budget can be met, give a lower one.")
        return {"budget": feasible}

    def _plan(self, model: Model, data: CocoDataModule, dtype: str) -> PruningPlan:
        specs, budget = self.prune, None
        if model.total is not None:
            assert self.budget is not None
            budget = replace(self.budget, total=model.total)
        else:
            specs = {
                name: replace(specs.get(name, PruneSpec()), sparsity=model.sparsities.get(name, 0.0))
                for name in {**specs, **model.sparsities}
            }
        return replace(self.options, prune=specs, budget=budget).resolve(self.pipeline, data, dtype)

    def _cut(self, data: CocoDataModule) -> dict[str, Any]:
        """The rows of each part: the first n drawn for the search, n more for the certificate, a few for the scale."""
        few, there = FIRST, data.captions
        wanted = 2 * data.n + few
        if wanted > there:
            raise InputError(
                f"--data.n={data.n} needs {wanted} captions, {data.n} for the search, {data.n} for the certificate and "
                f"{few} for the scale of the loss, and its source has {there}: choose at most {(there - few) // 2}."
            )
        rows = data.drawn(wanted)
        places = {SEARCH: (0, data.n), CERTIFICATE: (data.n, 2 * data.n), SCALE: (2 * data.n, wanted)}
        return {part: rows.select(range(*place)) for part, place in places.items()}

    # --- the loop --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take up what an interrupted search has, or wait while another run makes it."""
        self.require_all_batches()
        self.resolve(self.data, self.precision_name)
        self._parent = os.getppid()
        self._lock = RunLock(self.output, self.record.directory.name)
        self.mine = self._lock.acquire(lambda: self.record.finished)
        self.data.work = _Loader(self)
        if self.mine and self.trainer.is_global_zero:
            self.record.start()
            self.record.tidy()
        scores, facts = Processes().broadcast(read_state(self.directory()) if self.trainer.is_global_zero else None)
        assert self.search is not None
        self.search.scores, self.facts_of_models = scores, facts

    def teardown(self, stage: str) -> None:
        """Let other runs have the search."""
        self.data.work = None
        self._lock.release()

    def deal(self) -> Iterator[Work]:
        """This process's batches, as the search wants them; the processes take one after another."""
        assert self.search is not None
        for wanted in self.search.work() if self.mine else ():
            batches = self.parts[wanted.part]
            done = len(self.search.scores.get((wanted.model.name, wanted.part), ()))
            number = -(-done // batches.batch_size) + self.trainer.global_rank
            yield Work(*wanted, batches[number if number < len(batches) else FILLER])

    @property
    def most_batches(self) -> int:
        """No search takes more."""
        models = sum(map(len, self.search.paths.values())) + 2 if self.search else 0
        return 1 + 2 * (models + 1) * sum(map(len, self.parts.values()))

    def predict_step(self, work: Work) -> list[int]:
        """Draw a batch by the model that is wanted, score it, and hand the scores of all processes to the search."""
        if self.global_rank and os.getppid() != self._parent:
            raise RuntimeError("The process that started this one has died.")
        assert self.search is not None
        if self._weights is None:
            self._prepare()
        assert self._weights is not None
        self._weights.become(work.model, self._prune)
        found = self._scores(work) if work.batch.valid else []
        for scores in Processes().all_gather(found):
            self.search.add(work.model, work.part, scores)
        if self.trainer.is_global_zero:
            write_state(self.directory(), self.search.scores, self.facts_of_models)
        return work.batch.ids[: work.batch.valid]

    def _scores(self, work: Work) -> list[float]:
        batch, dense = work.batch, None
        if work.model != DENSE and any(column.needs_dense for column in self.score.columns):
            dense = stacked(self._pictures_of(DENSE, batch))
        pictures = self._pictures_of(work.model, batch)
        device = self.trainer.strategy.root_device
        positions = batch.positions[: batch.valid]
        images = ImageBatch(stacked(pictures).to(device), batch.prompts[: batch.valid], positions, dense)
        rows = {key: column.values(images) for key, column in self._columns.items()}
        scores = self.score.per_image(rows)[self.scored].double().tolist()
        return [score if picture.finite else float("nan") for score, picture in zip(scores, pictures, strict=True)]

    def _pictures_of(self, model: Model, batch: Batch) -> list[Picture]:
        """Those of the dense model were drawn before, and are drawn again where they were lost."""
        paths = [self.record.image_path(f"{model.name}/{name}") for name in batch.file_names[: batch.valid]]
        if not all(path.exists() for path in paths):
            assert self._weights is not None
            self._weights.become(model, self._prune)
        return self.pictures(batch, paths)

    # --- models ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Load the model and the networks that measure."""
        self._weights = None  # of an earlier run
        self.load()
        self._columns: dict[str, Column] = {column.key: column for column in self.score.columns}
        for column in self._columns.values():
            column.prepare(self.trainer.strategy.root_device)
        names = self.prune if self.budget is None else self.pipeline.prunable
        self._weights = Weights(self.pipeline, {name: self.prune.get(name, PruneSpec()) for name in names}, DENSE)

    def _prune(self, model: Model) -> None:
        """Prune the dense pipeline in place; collective."""
        plan = self._plan(model, self.data, self.precision_name)
        self.gather(plan.calibration)
        reports = plan.apply()
        masks = {name: report.mask_hash for name, report in reports.items()}
        self.facts_of_models[model.name] = {"sparsity": plan.account(reports), "masks": masks}

    def on_predict_epoch_end(self) -> None:
        """Write what was found."""
        generated = sum(Processes().all_gather(self.generated))
        if self.mine and self.trainer.is_global_zero:
            write_answer(self, generated)
        Processes().barrier()


class _Loader:
    """The batches of a search, which are known one by one: what is drawn next depends on the scores before."""

    def __init__(self, module: SearchModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Work]:
        return self.module.deal()

    def __len__(self) -> int:
        return self.module.most_batches  # known lengths keep the trainer from looking a batch ahead
