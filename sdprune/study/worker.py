"""Processes that import the package once and then run many cells of a sweep, one after another.

A worker reads a JSON line for each task and answers with one. It ends when its input does, also in the middle of a
cell, so that none outlives the sweep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from sdprune.errors import InputError, cause


@dataclass
class Outcome:
    """What became of a cell.

    Args:
        results: of the record; nothing of `fit`.
        failure: one line, where it failed.
        wandb: where its W&B runs can be seen, or the commands that send them.
        seconds: it took.
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    wandb: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Checked(NamedTuple):
    """What can be told of a command before it runs."""

    fault: str | None = None
    """One line on what is wrong with it."""
    finished: bool = False
    """Whether its record is there, as far as local files tell."""
    numbers: list[str] = []  # noqa: RUF012 (never changed)
    """Names of its results' numbers, as W&B has them; one that ends with a slash stands for all that begin so."""


class DiedError(Exception):
    """A worker's process died; the message is one line."""


class Worker:
    """A process of this package's own.

    Args:
        threads: that torch may use; None leaves the environment's number.
    """

    def __init__(self, threads: int | None = None) -> None:
        environment = os.environ if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sdprune.study.worker"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return self.process.poll() is None

    def ask(self, task: str, given: Any) -> Any:
        """Do one task and return what it gives.

        Args:
            task: `run` with the words of a command, or `check` with a list of commands.
            given: to the task.

        Raises:
            DiedError: the process died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([task, given]) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            self.process.kill()
            code = self.process.wait()
            raise DiedError(f"its process died (exit code {code}); it may want more memory") from error

    def end(self) -> None:
        """Stop it, also in the middle of a cell: the trainer would hear a mere request to terminate when it is done."""
        self.process.kill()
        self.process.communicate()


def run_command(words: Sequence[str]) -> Outcome:
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


def run_process(words: Sequence[str]) -> Outcome:
    """Run a command in a process of its own, for cells that start further processes, each with the same words."""
    done = subprocess.run([sys.executable, "-P", "-m", "sdprune", *words], capture_output=True, text=True)
    told = done.stdout.splitlines()
    wandb = [line.split(maxsplit=1)[1] for line in told if line.startswith("W&B ")]
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        failure = lines[-1].removeprefix("sdprune: ").removeprefix("error: ").removeprefix("failed: ")
        return Outcome({}, failure, wandb)
    paths = [line.split(maxsplit=1)[1] for line in told if line.startswith("results ")]
    if not paths:
        return Outcome(wandb=wandb)
    with open(paths[0], encoding="utf-8") as file:
        return Outcome(dict(json.load(file)), wandb=wandb)


def _serve() -> None:
    """Answer tasks until the input ends. What a run prints goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    from sdprune.configuration.quiet import quiet

    quiet()
    from sdprune.configuration.checking import check

    tasks: SimpleQueue[str] = SimpleQueue()
    Thread(target=_listen, args=(tasks,), daemon=True).start()
    while True:
        task, given = json.loads(tasks.get())
        answer: Any = asdict(run_command(given)) if task == "run" else check(given)
        print(json.dumps(answer), file=answers, flush=True)


def _listen(tasks: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)  # the sweep is gone: no cell is finished for nobody


if __name__ == "__main__":
    try:
        _serve()
    except KeyboardInterrupt:
        sys.exit(130)
