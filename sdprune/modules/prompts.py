"""Components that are calibrated on prompts, and what their statistics depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from sdprune.calibration.observer import InputObserver
from sdprune.calibration.pruned_error import alone_at
from sdprune.calibration.requests import Request
from sdprune.calibration.settings import Calibration
from sdprune.data import Batch
from sdprune.identity import code_of
from sdprune.pipelines import Component, Sampling
from sdprune.pipelines.sampling import image_seed
from sdprune.pruning import PruneSpec
from sdprune.pruning.narrowing import NarrowSpec
from sdprune.pruning.statistics import statistic
from sdprune.pruning.statistics.alone_error import AloneError
from sdprune.pruning.statistics.layer_error import LayerError
from sdprune.pruning.statistics.pruned_error import Probe, PrunedError, ReadAt
from sdprune.pruning.statistics.removal_error import RemovalError
from sdprune.pruning.timesteps import Timesteps

NAME = PrunedError.name


@dataclass(frozen=True)
class PromptSubject:
    """A component of a pipeline that runs on batches of calibration prompts.

    Args:
        component: of a family.
        sampling: how images are drawn.
        seed: of their noise.
        calibration: what counts.
    """

    component: Component
    sampling: Sampling
    seed: int
    calibration: Calibration

    @property
    def name(self) -> str:  # noqa: D102
        return self.component.name

    @property
    def module(self) -> nn.Module:  # noqa: D102
        return self.component.module

    @property
    def steps(self) -> int:  # noqa: D102
        return self.component.steps(self.sampling)

    @property
    def calls_per_batch(self) -> int:  # noqa: D102
        return self.component.calls(self._observed)

    @property
    def _observed(self) -> Sampling:
        """How it runs when statistics are gathered: text encoders without guidance, unless the empty prompt counts."""
        if self.component.role == "denoiser" or self.calibration.empty_prompt:
            return self.sampling
        return replace(self.sampling, guidance=1.0)

    def run(self, batch: Batch, before_step: Callable[[int], None]) -> None:  # noqa: D102
        self.component.run(batch.prompts, self._seeds(batch), self._observed, before_step)

    def replays(self, sequential: bool) -> bool:  # noqa: D102
        return self.component.role == "text" or not sequential or self.calibration.latents == "dense"

    def replaying(self, before_step: Callable[[int], None]) -> AbstractContextManager[Callable[[int], None]]:  # noqa: D102
        return self.component.counting(before_step)

    def bring(self) -> None:  # noqa: D102
        self.component.family.bring(self.name)

    def dense_inputs(self, batch: Batch, probe: Probe) -> Callable[[], Tensor]:  # noqa: D102
        keep = self.component.predictions if probe.read_at == "prediction" else self.component.dense_inputs
        run = keep(batch.prompts, self._seeds(batch), self.sampling, probe.steps)

        def run_and_bring() -> Tensor:
            found = run()
            self.bring()  # the last component that ran may be another one
            return found

        return run_and_bring

    def read_at(self, probe: Probe) -> ReadAt:
        """Where an error is read: a denoiser's output is the prediction."""
        return "prediction" if self.component.role == "denoiser" else probe.read_at

    def _seeds(self, batch: Batch) -> list[int]:
        return [image_seed(self.seed, f"calibration:{position}") for position in batch.positions]

    def try_out(self) -> None:  # noqa: D102
        self.component.run(["a picture"], [0], self._observed)

    def set_up(self, observer: InputObserver, batch: Batch) -> None:  # noqa: D102
        observer.batch_size, observer.valid = len(batch.prompts), batch.valid
        if not self.calibration.padding:
            observer.tokens = self.component.tokens(batch.prompts)
        text, settings = self.component.role == "text", self.calibration
        unconditional = settings.empty_prompt if text else settings.unconditional
        observer.weights = partial(self.component.weights, unconditional=unconditional)
        observer.rows = self.component.rows

    def facts(self) -> dict[str, Any]:
        """What its statistics depend on beside model and prompts."""
        if self.component.role == "text":
            counts = self.calibration.empty_prompt if self.sampling.guidance > 1 else 0.0
            return {"padding": self.calibration.padding, "empty_prompt": counts}
        return self.drawing() | {"unconditional": self.calibration.unconditional}

    def guided(self) -> dict[str, Any]:
        """What embeddings depend on that are compared: guided, those of the empty prompt are among them."""
        return {"guided": self.sampling.guidance > 1} if self.component.role == "text" else {}

    def drawing(self) -> dict[str, Any]:
        """What the latents depend on beside model and prompts."""
        return {"sampling": self.sampling.describe(), "seed": self.seed}


class Requests:
    """Writes down the statistics that prunings need, and what these depend on.

    Args:
        subjects: the components, by name.
        facts: what all statistics depend on: code, model, dtype and prompts.
    """

    def __init__(self, subjects: Mapping[str, PromptSubject], facts: Mapping[str, Any]) -> None:
        self.subjects, self.facts = subjects, facts

    def of_model(self, component: str, names: Iterable[str], spec: PruneSpec) -> list[Request]:
        """Statistics of the dense model, of all layers of the kinds that a specification names."""
        kinds = sorted(set(spec.layers))
        every = PruneSpec(
            layers=kinds, timesteps=spec.timesteps, exclude=self.subjects[component].component.idle(kinds)
        )
        return self._requests(component, names, every, {"layers": kinds})

    def of_layers(
        self, component: str, names: Iterable[str], timesteps: Timesteps, layers: Sequence[str],
        more: Mapping[str, Any] | None = None,
    ) -> list[Request]:  # fmt: skip
        """Statistics of the dense model, of some of its Linear and Conv2d layers; `more` are further facts."""
        some = PruneSpec(layers=["Linear", "Conv2d"], include=list(layers), timesteps=timesteps)
        return self._requests(component, names, some, {"layers": sorted(layers), **(more or {})})

    def _requests(
        self, component: str, names: Iterable[str], spec: PruneSpec, which: Mapping[str, Any]
    ) -> list[Request]:
        common = {"component": component, **which, **self.facts, **self.subjects[component].facts()}
        found = []
        for name in sorted(names):
            made = statistic(name)
            facts = {**common, "statistic": name, **code_of(made)}
            if made.by_timesteps and self.subjects[component].steps > 1:
                facts["timesteps"] = spec.timesteps
            found.append(Request(component, name, spec, facts))
        return found

    def of_allocation(self, component: str, spec: PruneSpec) -> list[Request]:
        """What the allocation reads; before an error of pruning, what the criterion reads to prune."""
        probe = spec.allocation.probe
        if probe is None:
            return self.of_model(component, spec.allocation.statistics, spec)
        before = self.of_model(component, spec.criterion.statistics | spec.allocation.statistics - {NAME}, spec)
        alone, subject = alone_at(spec, probe.levels[0]), self.subjects[component]
        read_at = subject.read_at(probe)
        facts = {
            "component": component, "prune": {**alone.describe(), "sparsity": None},
            "probe": asdict(probe) | {"read_at": read_at},
            "reads": [one.facts for one in before], **self.facts, **subject.facts(),
            **(subject.drawing() if read_at == "prediction" else subject.guided()),
        }  # fmt: skip
        for name in (AloneError.name, NAME):
            read, of = tuple(before), {**facts, "statistic": name}
            before = [*before, Request(component, name, alone, of, before=read, probe=probe)]
        return before

    def of_removal(
        self, component: str, spec: NarrowSpec, layers: Sequence[str], before: Sequence[Request]
    ) -> list[Request]:
        """The errors by which measurement decides how many units each module loses; `before` is what the choice of
        units reads, `layers` are those that read units."""
        if not spec.flops:
            return []
        some, subject = PruneSpec(layers=["Linear", "Conv2d"], include=list(layers)), self.subjects[component]
        facts = {
            "component": component, "statistic": RemovalError.name, "narrow": {**spec.describe(), "flops": None},
            "probe": asdict(spec.probe), "reads": [one.facts for one in before], **self.facts, **subject.facts(),
            **subject.guided(),
        }  # fmt: skip
        return [Request(component, RemovalError.name, some, facts, False, tuple(before), spec.probe, spec)]

    def of_dropping(self, component: str, spec: NarrowSpec, layers: Sequence[str]) -> list[Request]:
        """The errors by which measurement decides which whole layers are dropped; `layers` are their keys."""
        if not layers:
            return []
        some, subject = PruneSpec(layers=["Linear"], include=list(layers)), self.subjects[component]
        facts = {
            "component": component, "statistic": LayerError.name, "layers": list(layers),
            "probe": asdict(spec.layer_probe), **self.facts, **subject.facts(), **subject.drawing(),
        }  # fmt: skip
        return [Request(component, LayerError.name, some, facts, probe=spec.layer_probe, narrow=spec)]

    def of_criterion(self, component: str, spec: PruneSpec) -> list[Request]:
        """What the criterion reads."""
        dense = self.of_model(component, spec.criterion.statistics, spec)
        if not spec.sequential:
            return dense
        before = tuple(self.of_allocation(component, spec))
        more = {"prune": spec.describe(), "allocation": [request.facts for request in before]}
        subject = self.subjects[component]
        if subject.component.role == "denoiser" and subject.calibration.latents != "pruned":
            more["latents"] = subject.calibration.latents
        return [replace(one, spec=spec, sequential=True, facts={**one.facts, **more}, before=before) for one in dense]
