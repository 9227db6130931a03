"""Runs many commands: in this process, several at once in workers, or each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from sdprune.study.worker import Checked, DiedError, Outcome, Worker, run_command, run_process


class Runner:
    """Runs cells in this process, or several at once in workers.

    Args:
        jobs: cells at once.
        apart: each cell in a process of its own, since it starts further ones with the same words.
    """

    def __init__(self, jobs: int, apart: bool) -> None:
        self.jobs, self.apart = jobs, apart
        given = "OMP_NUM_THREADS" in os.environ
        self.threads = None if given else max(1, len(os.sched_getaffinity(0)) // jobs)
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        self.workers = [Worker(self.threads) for _ in range(jobs)] if jobs > 1 and not apart else []
        for worker in self.workers:
            self.idle.put(worker)
        self.stopped = False

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *details: object) -> None:
        self.stopped = True
        for worker in self.workers:
            worker.end()

    def check(self, commands: Sequence[Sequence[str]]) -> list[Checked]:
        """What can be told of each command before it runs."""
        if self.workers:
            return [Checked(*one) for one in self.workers[0].ask("check", commands)]
        from sdprune.configuration.checking import check

        return check(commands)

    def run(self, commands: Sequence[Sequence[str]]) -> Iterator[Outcome]:
        """What becomes of each command, in their order."""
        if self.jobs == 1:  # in the main thread, which can be interrupted
            yield from map(self._attempt, commands)
            return
        pool = ThreadPoolExecutor(self.jobs)
        try:
            yield from pool.map(self._attempt, commands)
        finally:
            self.stopped = True
            for worker in self.workers:
                worker.process.kill()
            pool.shutdown(cancel_futures=True)

    def _attempt(self, words: Sequence[str]) -> Outcome:
        """One bad cell must not stop the others."""
        started = time.monotonic()
        try:
            outcome = run_process(words) if self.apart else self._work(words) if self.workers else run_command(words)
        except DiedError as error:
            outcome = Outcome({}, str(error))
        return replace(outcome, seconds=time.monotonic() - started)

    def _work(self, words: Sequence[str]) -> Outcome:
        worker = self.idle.get()
        try:
            if not worker.alive and not self.stopped:
                worker = Worker(self.threads)
                self.workers.append(worker)
            if self.stopped:  # perhaps while this one was made
                worker.process.kill()
            return Outcome(**worker.ask("run", words))
        finally:
            self.idle.put(worker)


def several_processes(words: Sequence[str]) -> bool:
    """Whether a cell may start processes of its own, which would begin the whole sweep once more."""
    if any(word.startswith(("--trainer.devices", "--trainer.num_nodes", "--trainer.strategy")) for word in words):
        return True
    if len(list(Path("/dev").glob("nvidia[0-9]*"))) < 2 and not any(map(os.path.exists, ("/dev/dxg", "/dev/kfd"))):
        return False  # without the seconds that torch takes to import

    import torch

    return torch.cuda.device_count() > 1
