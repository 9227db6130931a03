"""Gathering what a store lacks: batches through components, to the same bits on any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import torch

from sdprune.calibration.disk import Need, kept_need, require_space, statistics_need
from sdprune.calibration.execution import Flow, flow_of, order_of_calls
from sdprune.calibration.gathering import Gathering
from sdprune.calibration.observer import BatchSums, Totals
from sdprune.calibration.passes import MEMORY, Pass, plan_passes
from sdprune.calibration.progress import CalibrationState, ProgressReport, size_shown
from sdprune.calibration.pruned_error import Measurement
from sdprune.calibration.removal_error import LayerMeasurement, RemovalMeasurement
from sdprune.calibration.replay import most_kept
from sdprune.calibration.requests import Request, Subject
from sdprune.calibration.store import Store
from sdprune.errors import InputError
from sdprune.processes import Processes
from sdprune.pruning import Statistics, statistic
from sdprune.pruning.statistics.alone_error import AloneError
from sdprune.pruning.statistics.layer_error import LayerError
from sdprune.pruning.statistics.pruned_error import Probe, PrunedError

KEPT = 64 << 30
_SAVING = 0.05  # share of the time that may go into saving sums for the case of an interruption


class Collector:
    """Gathers what a store lacks, pass by pass over the batches; all processes call every method together.

    Statistics of the dense model are gathered in the same passes. Those that depend on pruning between the passes have
    passes of their own; errors of pruning are measured without any. What was interrupted goes on where it was saved.

    Args:
        subjects: the components, by name.
        requests: the statistics; those of a component's dense model come before those of its pruning in order.
        store: where they go.
        memory: bytes that the sums of one pass may take.
        processes: of this run.
        report: is called in every denoising step, and for every unit that is measured.
        images: number of calibration samples in a pass; 0 if that is not known.
        keep: bytes of what blocks give that may be kept in a file by a process, so that the pipeline runs once.
        first: a batch of the first n samples, the same on every process.
        batch: number of samples in a batch, filler included.
    """

    def __init__(
        self, subjects: Mapping[str, Subject], requests: Iterable[Request], store: Store, memory: int = MEMORY,
        processes: Optional[Processes] = None, report: Optional[Callable[[CalibrationState], None]] = None,
        images: int = 0, first: Callable[[int], Any] = lambda n: None, keep: int = KEPT,
        batch: int = 1,
    ) -> None:  # fmt: skip
        self.subjects, self.store, self.memory, self.images = subjects, store, memory, images
        self.first, self.keep, self.batch = first, keep, batch
        self.costs: list[str] = []
        """What passes cost where there are several, in plain lines."""
        self.processes = processes or Processes()
        self._groups = self._grouped(requests)
        self._kept = 0
        """Bytes that this process keeps at most: that of one group at a time."""
        self._planned = [self._plan(group) for group in self._groups]
        missing = [
            one
            for group, (passes, _) in zip(self._groups, self._planned, strict=True)
            for one in passes
            if one.missing(self._layers(group))
        ]
        require_space(self._needs([one.memory // 2 for one in missing]), self.processes)
        self.passes = len(missing)
        """Number of passes over the batches that this run makes."""
        self._report = ProgressReport(report, self.passes, images)
        self.batches = 0
        """Number of batches that the current pass has been over, on all processes."""
        self.totals: dict[str, Totals] = {}
        """Sums of the current pass, by statistic."""
        self._group = self._number = -1
        """Numbers of the current group and of its pass; -1 before the first batch."""

    @property
    def done(self) -> bool:
        """Whether everything is in the store."""
        return not self._groups or self._group == len(self._groups)

    def run(self, batches: Callable[[], Iterable[tuple[Any, int, int]]]) -> None:
        """All passes.

        Args:
            batches: makes the batches of a pass, each with its index among those of all processes and the number of
                samples in it that are no filler.
        """
        while not self.done:
            for batch, index, valid in batches():
                self.step(batch, index, valid)
            self.end_pass()

    def step(self, batch: Any, index: int, valid: int) -> None:
        """One batch on every process: run it, and add the sums of all processes in the order of the batches."""
        if self._group < 0:
            self._next_group()
        if self.done:
            return
        fresh = valid > 0 and index >= self.batches
        self._report.begin_batch(valid * self.processes.world_size, self._subject.steps)
        sums = self._visit(batch, index) if fresh else {}
        calls = {(name, layer): n for name, one in sums.items() for layer, n in one.calls.items()}
        of_all = self.processes.all_gather((index, valid if fresh else 0, calls))
        for one, targets in self._pass.observed:
            for target in targets:
                key = (one.name, target.name)
                if not any(key in called for _, _, called in of_all):
                    continue
                own = sums[one.name].totals[target.name] if key in calls else one.empty(target)
                values = self.processes.gather(own)  # only the first process has them
                for (_, _, called), value in zip(of_all, values, strict=False):
                    if key in called:
                        self.totals[one.name].add(target.name, value)
        for total in self.totals.values():
            total.samples += sum(valid for _, valid, _ in of_all)
        self.batches = max(self.batches, *(index + 1 for index, _, _ in of_all))
        self._save()
        self._report.end_batch(max(total.samples for total in self.totals.values()))

    def end_pass(self) -> None:
        """All batches are through: store the statistics, prune where that is part of it, and begin the next pass."""
        if self.done or self._group < 0:
            return
        samples = max(total.samples for total in self.totals.values())
        if self.images and samples != self.images:
            raise InputError(
                f"A pass saw {samples} of {self.images} captions. Leave out --trainer.limit_predict_batches, "
                "--trainer.fast_dev_run and --trainer.use_distributed_sampler."
            )
        if self.processes.is_first:
            for request in self._requests:
                if request.statistic in self.totals:
                    self.store.add(request.facts, self.totals[request.statistic].finish())
        self.processes.barrier()
        progress, self.totals = self._progress, {}
        self._finish_pass()
        self._next_pass()
        if self.processes.is_first:
            progress.delete()
        self.processes.barrier()

    # --- groups and passes -----------------------------------------------------------------------------------

    def _grouped(self, requests: Iterable[Request]) -> list[list[Request]]:
        """Requests that are gathered in the same passes: of one component, and of one pruning in sequential order. A
        probe is a group of its own, without passes."""
        missing = {str(request.facts): request for request in requests if request.facts not in self.store}
        groups: dict[tuple[str, int], list[Request]] = {}
        for request in missing.values():
            own = request if request.probe else request.spec if request.sequential else None
            groups.setdefault((request.component, id(own)), []).append(request)
        return list(groups.values())

    def _plan(self, group: Sequence[Request]) -> tuple[list[Pass], Optional[Flow]]:
        """The passes, and how values go through the component's blocks where these are run one by one."""
        first, subject = group[0], self.subjects[group[0].component]
        if first.probe is not None:
            return [], None
        targets = first.targets(subject.module)
        statistics = [statistic(one.statistic, subject.steps, one.spec.timesteps) for one in group]
        spec = first.spec if first.sequential else None
        replays = subject.replays(first.sequential)
        if spec is None:
            passes = plan_passes(targets, statistics, self.memory)
            if len(passes) < 2 or not replays:
                return passes, None
        with torch.inference_mode(False):
            if not replays:
                order = order_of_calls(subject.module, targets, subject.try_out)
                return plan_passes(targets, statistics, self.memory, spec, order), None
            flow = flow_of(subject.module, targets, subject.try_out)
        ordered = plan_passes(targets, statistics, self.memory, spec, flow.order)
        if len(ordered) < 2 or not flow.blocks:
            return ordered if spec else passes, None
        batches = -(-self.images // (self.batch * self.processes.world_size))
        calls = subject.calls_per_batch * batches + 1  # one is read while what it gives next is written
        kept = most_kept(flow, ordered) * calls * self.batch
        runs_once = kept <= self.keep
        chosen = ordered if spec or runs_once else passes
        what = f"{subject.name} ({', '.join(one.statistic for one in group)}): {len(chosen)} passes"
        if runs_once:
            how = f"one of them with its pipeline; keeps up to {size_shown(kept)} in a file of each process."
        else:
            how = (
                f"each with its pipeline. It would run once if {size_shown(kept)} in a file of each process were kept, "
                f"more than the {size_shown(self.keep)} of --model.calibration.kept_gib."
            )
        self.costs.append(f"{what}, {how}")
        self._kept = max(self._kept, kept * runs_once)
        return chosen, flow if runs_once else None

    def _needs(self, sums: Sequence[int]) -> list[Need]:
        """What this process writes, by the bytes of each pass: the sums of one that runs are there twice meanwhile."""
        needs = [kept_need(self._kept)]
        if self.processes.is_first and self.store.root is not None:
            needs.append(statistics_need(self.store.root, sum(sums) + 2 * max(sums, default=0)))
        return needs

    def _next_group(self) -> None:
        self._group += 1
        if self.done:
            return self._report.close()
        self._requests = self._groups[self._group]
        first = self._requests[0]
        self._subject = self.subjects[first.component]
        dense = {one.statistic: self.store.load(one.facts) for one in first.before}
        if first.probe is not None:
            self._measure(first, first.probe, dense)
            return self._next_group()
        spec = first.spec if first.sequential else None
        passes, flow = self._planned[self._group]
        self._gathering = Gathering(self._subject.module, passes, spec, dense, flow)
        self._number = -1
        self._next_pass()

    def _measure(self, request: Request, probe: Probe, statistics: Statistics) -> None:
        """Measure errors of pruning; those that an interrupted run has stored stay."""
        subject = self._subject
        with torch.inference_mode(False), torch.no_grad():
            run = subject.dense_inputs(self.first(probe.samples), probe)
            targets = request.targets(subject.module)
            measurement: Measurement
            if request.narrow is None:
                measurement = Measurement(subject.module, targets, request.spec, statistics, probe, run)
            elif request.statistic == LayerError.name:
                measurement = LayerMeasurement(subject.module, request.narrow, run)
            else:
                measurement = RemovalMeasurement(subject.module, request.narrow, statistics, probe, run)
            done = self.processes.broadcast(frozenset(self.store.load(request.facts)))
            self._report.begin_measuring(len(done))
            if request.statistic == PrunedError.name:
                measured = measurement.beside(statistics[AloneError.name], done, self.processes)
            else:
                measured = measurement.alone(done, self.processes)
            for found in measured:
                if self.processes.is_first:
                    self.store.add(request.facts, found)
                self._report.measured(f"{subject.name} ({request.statistic})", len(found), len(targets))
        if self.processes.is_first:
            self.store.finish(request.facts)
        self.processes.barrier()

    def _next_pass(self) -> None:
        """Go to the next pass that is not in the store; after the last one of a group to the next group."""
        passes = self._gathering.passes
        self._number += 1
        while self._number < len(passes) and not passes[self._number].missing(self._layers(self._requests)):
            self._finish_pass()
            self._number += 1
        if self._number == len(passes):
            self._gathering.close()
            if self.processes.is_first:
                for request in self._requests:
                    self.store.finish(request.facts)
            self.processes.barrier()
            return self._next_group()
        self._begin_pass()

    def _finish_pass(self) -> None:
        if self._gathering.spec is not None:
            self._subject.bring()
        self._gathering.finish(self._number, self._stored())

    def _begin_pass(self) -> None:
        observed = self._pass.observed
        layers = {one.name: [target.name for target in targets] for one, targets in observed}
        facts = {"requests": [request.facts for request in self._requests], "layers": layers}
        self._progress = self.store.progress(facts)
        self.totals = {one.name: Totals(one) for one, _ in observed}
        self.batches, samples, sums = self._progress.load() or (0, 0, {})
        for one, targets in observed:
            self.totals[one.name].samples = samples
            for target in targets:
                if (value := sums.get(f"{one.name}/{target.name}")) is not None:
                    self.totals[one.name].add(target.name, value)
        self._saved, self._cost = time.monotonic(), 0.0
        names = ", ".join(request.statistic for request in self._requests)
        self._report.begin_pass(f"{self._subject.name} ({names})", samples)

    @property
    def _pass(self) -> Pass:
        return self._gathering.passes[self._number]

    def _stored(self) -> dict[str, Mapping[str, Any]]:
        return {request.statistic: self.store.load(request.facts) for request in self._requests}

    def _layers(self, requests: Sequence[Request]) -> dict[str, set[str]]:
        return {request.statistic: set(self.store.load(request.facts)) for request in requests}

    # --- one batch -------------------------------------------------------------------------------------------

    def _visit(self, batch: Any, index: int) -> dict[str, BatchSums]:
        subject = self._subject

        def run(before_step: Callable[[int], None]) -> None:
            def begin(step: int) -> None:
                before_step(step)
                if step:
                    self._report.step()

            subject.run(batch, begin)

        # Only outside of inference mode tensors have a version, by which layers with one input share their sums.
        with torch.inference_mode(False), torch.no_grad():
            return self._gathering.visit(
                self._number, index, run, lambda observer: subject.set_up(observer, batch), subject.replaying
            )

    def _save(self) -> None:
        started = time.monotonic()
        if not self.processes.is_first or started - self._saved < self._cost / _SAVING:
            return
        sums = {f"{name}/{layer}": v for name, total in self.totals.items() for layer, v in total.sums.items()}
        samples = max(total.samples for total in self.totals.values())
        self._progress.save(self.batches, samples, sums)
        self._saved = time.monotonic()
        self._cost = self._saved - started
