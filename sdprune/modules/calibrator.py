"""Gathering statistics: batches of prompts through the model, on all processes, into the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from sdprune.data import Batch
from sdprune.modules.calibration_state import CalibrationWatch
from sdprune.modules.needs import Calibration, Need, is_text
from sdprune.pipelines import PipelineFamily, Sampling
from sdprune.pruning import (
    Gathering,
    Listener,
    Statistic,
    Sums,
    Target,
    Totals,
    count_passes,
    find_targets,
    order_of_calls,
    statistic,
    targets_of,
)
from sdprune.record import image_seed
from sdprune.store import StatisticsStore

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

_SAVING = 0.05  # share of the time that may go into saving sums for the case of an interruption


class Job:
    """Statistics of one component that are gathered together, pass by pass; stored passes are not run again.

    Args:
        needs: the statistics.
        gathering: listens to the component.
        store: where they go.
    """

    def __init__(self, needs: Sequence[Need], gathering: Gathering, store: StatisticsStore):
        self.needs, self.gathering, self.store = needs, gathering, store
        self.number = -1
        """Of the pass."""
        self.batches = 0
        """That the pass has been over."""
        self.totals: dict[str, Totals] = {}
        self._next()

    @property
    def done(self) -> bool:
        """Whether every pass has been over all batches."""
        return self.number == len(self.gathering.passes)

    def step(self, batch: Batch, visit: Callable[[int], dict[str, Sums]]) -> None:
        """One batch on every process: run it, and add the sums of all processes in the order of the batches."""
        fresh = batch.valid > 0 and batch.index >= self.batches
        sums = visit(self.number) if fresh else {}
        calls = {(name, layer): n for name, one in sums.items() for layer, n in one.calls.items()}
        everyone = of_everyone((batch.index, batch.valid if fresh else 0, calls))
        for name, target, empty in self.gathering.empty(self.number):
            key = (name, target.name)
            if not any(key in called for _, _, called in everyone):
                continue
            own = sums[name].totals[target.name] if key in calls else empty()
            for (_, _, called), value in zip(everyone, _to_first(own), strict=False):  # only the first has values
                if key in called:
                    self.totals[name].add(target.name, value)
        for total in self.totals.values():
            total.samples += sum(valid for _, valid, _ in everyone)
        self.batches = max(self.batches, *(index + 1 for index, _, _ in everyone))
        self._save()

    def end_pass(self, strategy: Strategy) -> None:
        """All batches are through: store the statistics, prune where that is part of it, and begin the next pass."""
        if strategy.is_global_zero:
            for need in self.needs:
                if need.statistic in self.totals:
                    self.store.add(need.facts, self.number, self.totals[need.statistic].finish())
        strategy.barrier("statistics")
        progress, self.totals = self.progress, {}
        self.gathering.finish(self.number, self._stored())
        self._next()
        if strategy.is_global_zero:
            progress.delete()
            if self.done:
                for need in self.needs:
                    self.store.finish(need.facts)
        strategy.barrier("finished")

    def _stored(self) -> dict[str, Any]:
        return {need.statistic: self.store.load(need.facts) for need in self.needs}

    def _next(self) -> None:
        """Go to the next pass that is not in the store."""
        self.number += 1
        stored = self._stored()
        while not self.done and all(t.name in stored[one.name] for one, ts in self._passed() for t in ts):
            self.gathering.finish(self.number, stored)
            self.number += 1
        if self.done:
            return self.gathering.close()
        layers = {one.name: [target.name for target in targets] for one, targets in self._passed()}
        self.progress = self.store.progress({"needs": [need.facts for need in self.needs], "layers": layers})
        self.totals = {one.name: Totals(one) for one, _ in self._passed()}
        self.batches, samples, sums = self.progress.load() or (0, 0, {})
        for name, total in self.totals.items():
            total.samples = samples
            own = {t.name: t for one, ts in self._passed() if one.name == name for t in ts}
            for layer in own:
                if (value := sums.get(f"{name}/{layer}")) is not None:
                    total.add(layer, value.to(own[layer].weight.device))
        self._saved, self._cost = time.monotonic(), 0.0

    def _passed(self) -> list[Any]:
        return self.gathering.passes[self.number]

    def _save(self) -> None:
        started = time.monotonic()
        if _rank() != 0 or started - self._saved < self._cost / _SAVING:
            return
        sums = {f"{name}/{layer}": v for name, total in self.totals.items() for layer, v in total.sums.items()}
        samples = max(total.samples for total in self.totals.values())
        self.progress.save(self.batches, samples, sums)
        self._saved = time.monotonic()
        self._cost = self._saved - started


class Calibrator:
    """Gathers what the store lacks, pass by pass over the batches; all processes call every method together.

    Text encoders see the calibration prompts as in generation without guidance. Any other component is calibrated by
    drawing the prompts' images, all steps, with the guidance of generation.

    Args:
        pipeline: the dense pipeline, loaded.
        needs: the statistics; those of a component's dense model come before those of its pruning in order.
        sampling: how images are drawn.
        seed: of their noise.
        calibration: what counts.
        store: where statistics are kept.
    """

    def __init__(
        self, pipeline: PipelineFamily, needs: Iterable[Need], sampling: Sampling, seed: int, calibration: Calibration,
        store: StatisticsStore,
    ):  # fmt: skip
        self.pipeline, self.sampling, self.seed = pipeline, sampling, seed
        self.calibration, self.store = calibration, store
        self._queues: dict[str, list[list[Need]]] = {}
        for need in {str(need.facts): need for need in needs if need.facts not in store}.values():
            groups = self._queues.setdefault(need.component, [])
            if not groups or groups[-1][0].spec is not need.spec:
                groups.append([])
            groups[-1].append(need)
        self._jobs: dict[str, Job] = {}
        self._orders: dict[str, list[str]] = {}
        self.watch = CalibrationWatch(lambda: min(job.batches for job in self._jobs.values()) if self._jobs else 0)
        self._over = 0  # passes of this run that are behind us
        self._start_jobs()

    @property
    def done(self) -> bool:
        """Whether everything is in the store."""
        return not self._jobs

    def step(self, batch: Batch) -> None:
        """One batch of prompts in every component's pass."""
        if self.done:
            return
        self.watch.begin_batch(batch.valid * _processes(), sum(map(self._steps_of, self._jobs)))
        for component, job in self._jobs.items():
            job.step(batch, lambda number, c=component, j=job: self._visit(c, j.gathering, number, batch))  # type: ignore[misc]
        self.watch.end_batch()

    def end_pass(self, strategy: Strategy) -> None:
        """All batches are through."""
        for job in self._jobs.values():
            job.end_pass(strategy)
        self._jobs = {component: job for component, job in self._jobs.items() if not job.done}
        self._over += 1
        self._start_jobs()

    def run(self, batches: Callable[[], Iterable[Batch]], strategy: Strategy) -> None:
        """All of it, outside a training loop."""
        while not self.done:
            for batch in batches():
                self.step(batch)
            self.end_pass(strategy)

    def _start_jobs(self) -> None:
        for component, groups in self._queues.items():
            while groups and self._may_start(component, groups[0]):
                needs = groups.pop(0)
                job = Job(needs, self._gathering(component, needs), self.store)
                if not job.done:
                    self._jobs[component] = job
                elif _rank() == 0:
                    for need in needs:  # interrupted after the last pass
                        self.store.finish(need.facts)
        jobs = self._jobs.items()
        what = ", ".join(f"{name} ({', '.join(need.statistic for need in job.needs)})" for name, job in jobs)
        self.watch.begin_pass(what, self._passes_left() if jobs else 0, self._over)

    def _passes_left(self) -> int:
        """Number of passes to come, the current one included: components are gathered together, or, where they are
        pruned in sequential order, one after another."""
        together, apart = dict.fromkeys(self._queues, 0), 0
        left = [
            (one, job.gathering.plan is None, len(job.gathering.passes) - job.number) for one, job in self._jobs.items()
        ]
        for component, groups in self._queues.items():
            for needs in groups:
                targets, limit = self._targets(needs[0]), int(self.calibration.hessian_gib * 2**30)
                order = self._order(component, targets) if needs[0].spec else None
                left.append((component, order is None, count_passes(targets, self._statistics(needs), order, limit)))
        for component, dense, passes in left:
            if dense:
                together[component] += passes
            else:
                apart += passes
        return max(together.values(), default=0) + apart

    def _steps_of(self, component: str) -> int:
        return 1 if is_text(component) else self.sampling.steps

    def _may_start(self, component: str, needs: Sequence[Need]) -> bool:
        """Whoever prunes its component runs alone: the others' statistics are those of a dense pipeline."""
        if needs[0].spec is not None:
            return not self._jobs
        return component not in self._jobs and not any(job.gathering.plan for job in self._jobs.values())

    def _gathering(self, component: str, needs: Sequence[Need]) -> Gathering:
        targets, spec = self._targets(needs[0]), needs[0].spec
        return Gathering(
            self.pipeline.components[component],
            targets,
            self._statistics(needs),
            spec,
            self._order(component, targets) if spec else (),
            {need.statistic: self.store.load(need.facts) for need in needs[0].allocation},
            replay=is_text(component),
            hessian_bytes=int(self.calibration.hessian_gib * 2**30),
        )

    def _order(self, component: str, targets: Sequence[Target]) -> list[str]:
        """In which order the layers run; the prompt is always the same, and so is what all processes find."""
        if component in self._orders:
            return self._orders[component]
        prompts = ["a picture"]

        def run() -> None:
            if is_text(component):
                self.pipeline.encode(prompts)
            else:
                self.pipeline.generate(prompts, [0], self.sampling, decode=False)

        with torch.inference_mode(False):
            self._orders[component] = order_of_calls(self.pipeline.components[component], targets, run)
        return self._orders[component]

    def _targets(self, need: Need) -> list[Target]:
        module = self.pipeline.components[need.component]
        return targets_of(module, need.spec) if need.spec else find_targets(module, need.layers)

    def _statistics(self, needs: Sequence[Need]) -> list[Statistic]:
        return [statistic(need.statistic, self._steps_of(need.component), need.timesteps) for need in needs]

    def _visit(self, component: str, gathering: Gathering, number: int, batch: Batch) -> dict[str, Sums]:
        text = is_text(component)
        tokens = self.pipeline.tokens(batch.prompts) if text and not self.calibration.padding else None

        def set_up(listener: Listener) -> None:
            listener.batch_size, listener.valid, listener.tokens = len(batch.prompts), batch.valid, tokens
            listener.unconditional = 1.0 if text else self.calibration.unconditional

        # Outside of inference mode tensors tell when they were changed, so that layers with one input can share sums.
        with torch.inference_mode(False), torch.no_grad():
            sums = gathering.visit(number, batch.index, self._encode(batch) if text else self._draw(batch), set_up)
        self.watch.step()  # the last one, or a text encoder's only one
        return sums

    def _encode(self, batch: Batch) -> Callable[[Sequence[Listener]], None]:
        return lambda _: self.pipeline.encode(batch.prompts)

    def _draw(self, batch: Batch) -> Callable[[Sequence[Listener]], None]:
        seeds = [image_seed(self.seed, f"calibration:{position}") for position in batch.positions]

        def run(listeners: Sequence[Listener]) -> None:
            def at(step: int) -> None:
                for listener in listeners:
                    listener.step = step
                if step:
                    self.watch.step()

            self.pipeline.generate(batch.prompts, seeds, self.sampling, decode=False, before_step=at)

        return run


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _processes() -> int:
    return dist.get_world_size() if _distributed() else 1


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def of_everyone(value: Any) -> list[Any]:
    """A small value of every process, in order of rank, which is the order of their batches; collective."""
    if not _distributed():
        return [value]
    values: list[Optional[Any]] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _to_first(value: Tensor) -> list[Tensor]:
    """Every process's tensor, on the first; elsewhere nothing."""
    if not _distributed():
        return [value]
    if _rank() != 0:
        dist.gather(value)
        return []
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.gather(value, values)
    return values
