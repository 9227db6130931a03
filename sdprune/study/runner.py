"""Runs the cells of a sweep: in this process, several at once in workers, or each by a command of its own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, cast

from sdprune.configuration.quiet import quiet
from sdprune.errors import InputError, cause


@dataclass
class Outcome:
    """What became of a cell: results of its record, or why it failed; where W&B shows its runs, or how to send them."""

    results: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    wandb: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_here(words: Sequence[str]) -> Outcome:
    """Run a command in this process."""
    from sdprune.cli import run
    from sdprune.runs.tracking import take_ended

    take_ended()  # of whatever ran before in this process
    try:
        results = run(words, summary=False)
        return Outcome(results, wandb=take_ended())
    except (Exception, SystemExit) as error:
        if cause(error, KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from error
        bad = cause(error, InputError) or error
        return Outcome({}, " ".join(str(bad).split()) or type(bad).__name__, take_ended())


def run_apart(words: Sequence[str]) -> Outcome:
    """Run a command by the command line, since it starts further processes, each with the words of the first."""
    done = subprocess.run([sys.executable, "-P", "-m", "sdprune", *words], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    wandb = [line.split(maxsplit=1)[1] for line in lines if line.startswith("W&B ")]
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        failure = last.removeprefix("sdprune: ").removeprefix("error: ").removeprefix("failed: ")
        return Outcome({}, failure, wandb)
    paths = [Path(line.split(maxsplit=1)[1]) for line in lines if line.startswith("results ")]
    return Outcome(json.loads(paths[0].read_text(encoding="utf-8")) if paths else {}, wandb=wandb)


class Worker:
    """A process that imports this package once and runs many cells; it ends with the process that started it.

    Torch may use `threads`; None leaves the environment's number.
    """

    def __init__(self, threads: int | None) -> None:
        self.environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        self.stopped = False
        self._start()

    def _start(self) -> None:
        # Not by multiprocessing: the helper process that it adds complains of killed workers and outlives the sweep.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from sdprune.study.runner import work; work()"], env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, words: Sequence[str]) -> Outcome:
        """Run a command there; when the process dies that command fails, and its successor takes the next."""
        try:
            if self.process.poll() is not None and not self.stopped:
                self._start()
            if self.stopped:  # perhaps while it was started
                self.process.kill()
            requests, answers = self.process.stdin, self.process.stdout
            assert requests is not None
            assert answers is not None
            pickle.dump(words, requests)
            requests.flush()
            return cast(Outcome, pickle.load(answers))
        except (EOFError, OSError, pickle.UnpicklingError):
            return Outcome({}, f"its process died (exit code {self.process.wait()}); it may need more memory")

    def stop(self) -> None:
        """Kill the process, also in the middle of a cell; a trainer that is terminated ends late."""
        self.stopped = True
        self.process.kill()
        self.process.wait()


def work() -> None:
    """Run commands of the standard input until it ends. What they print goes nowhere."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    quiet()
    commands: SimpleQueue[list[str]] = SimpleQueue()
    Thread(target=_receive, args=(commands,), daemon=True).start()
    while True:
        pickle.dump(run_here(commands.get()), answers)
        answers.flush()


def _receive(commands: SimpleQueue[list[str]]) -> None:
    with suppress(EOFError):
        while True:
            commands.put(pickle.load(sys.stdin.buffer))
    os._exit(0)  # the sweep is gone, also in the middle of a cell


def run_all(commands: Sequence[Sequence[str]], jobs: int) -> Generator[Outcome, None, None]:
    """Run commands, so many at once, and yield what becomes of each, in their order; close the generator to stop."""
    apart = any(map(several_processes, commands))
    if jobs == 1:  # in the main thread, which can be interrupted
        yield from (_timed(run_apart if apart else run_here, words) for words in commands)
        return
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, len(os.sched_getaffinity(0)) // jobs)
    workers = [] if apart else [Worker(threads) for _ in range(jobs)]
    idle: SimpleQueue[Callable[[Sequence[str]], Outcome]] = SimpleQueue()
    for run in [worker.run for worker in workers] or [run_apart] * jobs:
        idle.put(run)

    def run_idle(words: Sequence[str]) -> Outcome:
        run = idle.get()
        try:
            return _timed(run, words)
        finally:
            idle.put(run)

    pool = ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(run_idle, commands)
    finally:
        for worker in workers:
            worker.stop()
        pool.shutdown(cancel_futures=True)


def _timed(run: Callable[[Sequence[str]], Outcome], words: Sequence[str]) -> Outcome:
    started = time.monotonic()
    return replace(run(words), seconds=time.monotonic() - started)


def several_processes(words: Sequence[str]) -> bool:
    """Whether a cell may start processes, which would begin the whole sweep once more."""
    if any(word.startswith(("--trainer.devices", "--trainer.num_nodes", "--trainer.strategy")) for word in words):
        return True
    import torch

    return torch.cuda.device_count() > 1
