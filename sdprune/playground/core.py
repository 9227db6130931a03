"""Draws what a visitor has chosen: one prompt with the dense and a pruned model, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Optional

import numpy as np
import torch
from lightning import Trainer

from sdprune.calibration.progress import CalibrationState
from sdprune.data import CocoDataModule
from sdprune.errors import InputError
from sdprune.identity import fingerprint
from sdprune.metrics import ImageBatch, Score
from sdprune.modules import GenerationModule
from sdprune.modules.pruning_plan import PruningPlan
from sdprune.modules.weights import Weights
from sdprune.playground.view import PUBLISHED, Choice, View
from sdprune.pruning import PruneReport, PruneSpec
from sdprune.pruning.allocation import Allocation
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.granularity import Granularity
from sdprune.schema import choices_of, is_packaged

Key = Optional[str]
"""What tells pruned models apart; None is the dense one."""


@dataclass(frozen=True)
class Shown:
    """What is seen.

    Args:
        view: what was chosen.
        dense: uint8 [h, w, 3].
        pruned: the same of the pruned model.
        sparsity: as `account` gives it.
        scores: by name, of the dense and of the pruned picture; yes or no, a number, or None where nothing is said.
        remarks: what a reader should know: a sentence each.
    """

    view: View
    dense: np.ndarray
    pruned: np.ndarray
    sparsity: Mapping[str, Any]
    scores: Mapping[str, tuple[float | bool | None, float | bool | None]]
    remarks: Sequence[str]


class Playground:
    """A model that is dense and pruned in turn. Whoever calls it from several threads waits.

    The pictures are those that `sdprune predict` draws of the same prompt as its only sample.

    Args:
        module: what is drawn and how; its `prune` is where visitors begin, its `baseline` or else the model without
            pruning what they compare with.
        data: has the captions of calibration.
        trainer: decides device and precision.
        report: is called as statistics are gathered.

    Raises:
        InputError: for a configuration that the playground cannot show.
    """

    def __init__(
        self,
        module: GenerationModule,
        data: CocoDataModule,
        trainer: Trainer,
        report: Callable[[CalibrationState], None] = lambda state: None,
    ) -> None:
        if module.options.budget is not None:
            raise InputError("--model.budget decides sparsities, which are moved here: leave it out.")
        if any(spec.removes for spec in module.options.narrow.values()):
            raise InputError(
                "--model.narrow is no choice of this page: save the narrowed model with sdprune fit, and give its "
                "directory as --model.pipeline.model, and the original as --model.baseline."
            )
        module.pipeline.require([*module.options.prune])
        for name, spec in module.options.prune.items():
            if spec.band is not None:
                raise InputError(f"--model.prune.{name}.band is {list(spec.band)}: give a sparsity instead.")
        if trainer.world_size > 1:
            raise InputError(f"--trainer.devices are {trainer.world_size}: the playground draws on one.")
        self.module, self.data, self.trainer = module, data, trainer
        module.trainer, trainer.datamodule = trainer, data  # type: ignore[attr-defined]
        module.on_calibration = report
        self.precision = str(trainer.precision)
        self.components = list(module.pipeline.prunable)
        self.configured = {name: module.options.prune.get(name, PruneSpec()) for name in self.components}
        self.reference = self._reference()
        plan = self._plan(self.start)
        module.pipeline.check(module.sampling)
        plan.check(data)
        self.lock = Lock()
        self.dense_picture = lru_cache(32)(self._dense_picture)

    @property
    def start(self) -> View:
        """What is seen first."""
        choices = {
            name: Choice(spec.sparsity or 0.0, type(spec.criterion).__name__, type(spec.allocation).__name__,
                         PUBLISHED if spec.granularity == spec.criterion.granularities[0] else str(spec.granularity))
            for name, spec in self.configured.items()
        }  # fmt: skip
        return View((self.module.samples or ["a picture"])[0], self.module.seed, choices)

    @property
    def criteria(self) -> list[str]:
        """Names of the criteria."""
        return list(self._classes(Criterion, [spec.criterion for spec in self.configured.values()]))

    @property
    def allocations(self) -> list[str]:
        """Names of the allocations."""
        return list(self._classes(Allocation, [spec.allocation for spec in self.configured.values()]))

    @property
    def granularities(self) -> list[str]:
        """Names of the granularities, with some N:M."""
        found = self._classes(Granularity, [spec.ranked for spec in self.configured.values()]).values()
        return [PUBLISHED, *(one.name for one in found if one.name != "N:M"), "1:2", "2:4", "4:8"]

    @staticmethod
    def _classes(base: type, configured: Sequence[object]) -> dict[str, Any]:
        """The package's classes and those in the configuration, by name."""
        used, known = {type(one) for one in configured}, choices_of([base])
        return {name: cls for name, cls in known.items() if is_packaged(cls) or cls in used}

    # --- drawing -----------------------------------------------------------------------------------------------------

    def load(self, everything: bool = False) -> None:
        """Load the models, gather the statistics that the first picture needs, and the networks that measure.

        Args:
            everything: gather the statistics of all criteria and allocations.
        """
        with torch.inference_mode():
            self.module.load()
            plan = self._plan(self.start)
            self.weights: Weights[Key] = Weights(self.module.pipeline, self.configured, None)
            self.reports: dict[Key, dict[str, PruneReport]] = {None: {}}
            if self.reference is not self.module:
                self.reference.load()
            for score in self.scores:
                for column in score.columns:
                    column.prepare(self.trainer.strategy.root_device)
            plans = self._plans() if everything else [plan]
            requests = [one for other in plans for one in other.calibration.requests]
            distinct = {fingerprint(one.facts): one for one in requests}
            self.module.gather(replace(plan.calibration, requests=tuple(distinct.values())))

    def show(self, view: View) -> Shown:
        """Draw, and score.

        Raises:
            InputError: for choices that make no sense.
        """
        view = view.checked()
        plan = self._plan(view)
        plan.check(self.data)
        with self.lock, torch.inference_mode():
            dense, finite = self.dense_picture(view.prompt, view.seed)
            pruned, whole = self._draw(view, plan)
            sparsity = plan.account(self.reports[self.weights.active])
            scores, remarks = self._scores(view.prompt, dense, pruned)
        if not (finite and whole):
            remarks.append("Not all numbers of a picture are finite; it is black where they are not.")
        return Shown(view, dense, pruned, sparsity, scores, [*self._truncated(view.prompt), *remarks])

    def strip(self, view: View, component: str, sparsities: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
        """The same prompt and noise at several sparsities of a component, all else as it is seen."""
        view = view.checked()
        for sparsity in sparsities:
            choice = replace(view.choices[component], sparsity=sparsity)
            other = replace(view, choices={**view.choices, component: choice})
            plan = self._plan(other)
            with self.lock, torch.inference_mode():
                yield sparsity, self._draw(other, plan)[0]

    def _draw(self, view: View, plan: PruningPlan) -> tuple[np.ndarray, bool]:
        """The pruned model's picture, and whether it is finite."""
        self.weights.become(fingerprint(plan.describe()) if plan.specs else None, lambda key: self._prune(key, plan))
        return self._sample(self.module, view.prompt, view.seed)

    def _dense_picture(self, prompt: str, seed: int) -> tuple[np.ndarray, bool]:
        if self.reference is self.module:
            self.weights.become(None, lambda _: None)
        return self._sample(self.reference, prompt, seed)

    @staticmethod
    def _sample(module: GenerationModule, prompt: str, seed: int) -> tuple[np.ndarray, bool]:
        module.seed = seed
        ((pixels, finite),) = module.draw_samples([prompt])
        return pixels, finite

    def _prune(self, key: Key, plan: PruningPlan) -> None:
        """Prune the dense pipeline in place."""
        self.module.gather(plan.calibration)
        self.reports = {None: {}, key: plan.apply()}

    # --- plans -------------------------------------------------------------------------------------------------------

    def _reference(self) -> GenerationModule:
        """What pictures are compared with."""
        if self.module.given_baseline is None:
            return self.module
        if (Path(self.module.given_baseline) / "results.json").exists():
            raise InputError(f"--model.baseline={self.module.given_baseline} is a finished run: give a model.")
        found = self.module.find_baseline()
        assert isinstance(found, GenerationModule)
        found.trainer = self.trainer
        found.pipeline.check(found.sampling)
        return found

    def _plan(self, view: View) -> PruningPlan:
        """A view's pruning, resolved."""
        specs = {}
        for name, choice in view.choices.items():
            try:
                specs[name] = choice.spec(self.configured[name])
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        options = replace(self.module.options, prune=specs, seed=view.seed)
        return options.resolve(self.module.pipeline, self.data, self.precision)

    def _plans(self) -> Iterator[PruningPlan]:
        """Plans that between them read all statistics that one pass gathers, at the seed that is seen first."""
        start = self.start
        pairs = [(criterion, "Uniform") for criterion in self.criteria]
        for name, first in start.choices.items():
            for criterion, allocation in [*pairs, *((first.criterion, one) for one in self.allocations)]:
                choice = Choice(0.5, criterion, allocation)
                try:
                    if not choice.spec(self.configured[name]).sequential:
                        yield self._plan(replace(start, choices={name: choice}))
                except InputError:  # choices that do not go together
                    continue

    # --- what is said of it ------------------------------------------------------------------------------------------

    @property
    def scores(self) -> list[Score]:
        """Those that judge single images."""
        return [one for one in self.module.scores.scores if type(one).per_image is not Score.per_image]

    def _scores(
        self, prompt: str, dense: np.ndarray, pruned: np.ndarray
    ) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
        if dense.shape != pruned.shape:
            raise InputError(
                f"The models draw {dense.shape[1]} x {dense.shape[0]} and {pruned.shape[1]} x {pruned.shape[0]} "
                "pixels: give --model.sampling.height and --model.sampling.width."
            )
        found: dict[str, tuple[Any, Any]] = {}
        remarks = []
        before = torch.from_numpy(np.stack([dense, dense])).permute(0, 3, 1, 2)
        images = torch.from_numpy(np.stack([dense, pruned])).permute(0, 3, 1, 2)
        batch = ImageBatch(images.to(self.trainer.strategy.root_device), [prompt] * 2, range(2), before)
        rows: dict[str, torch.Tensor] = {}
        for score in self.scores:
            try:
                score.check_prompts([prompt])
            except InputError:
                remarks.append(f"{type(score).__name__} cannot judge this prompt.")
                continue
            rows |= {one.key: one.values(batch) for one in score.columns if one.key not in rows}
            for name, values in score.per_image(rows).items():
                said = [None if np.isnan(one) else bool(one) if score.judges else one for one in values.tolist()]
                if said != [None, None]:
                    found[name] = said[0], said[1]
        return found, remarks

    def _truncated(self, prompt: str) -> list[str]:
        tokenizer = self.module.pipeline.tokenizers["tokenizer"]
        tokens = len(tokenizer([prompt], truncation=False, verbose=False)["input_ids"][0])
        most = tokenizer.model_max_length
        return [f"The prompt has {tokens} tokens, and {most} are read."] if tokens > most else []
