"""Processes that import the package once and then run many cells of a sweep, one after another.

A worker reads a JSON line for each task and answers with one: `{"results": ...}` or `{"error": "one line"}`. It ends
when its input does, so that none outlives the sweep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sdprune.errors import InputError, cause


class FailedError(Exception):
    """A cell failed; the message is one line."""


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
            FailedError: what went wrong, or the process died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([task, given]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            self.process.kill()
            code = self.process.wait()
            raise FailedError(f"its process died (exit code {code}); it may want more memory") from error
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer["results"]

    def end(self) -> None:
        """Stop it, also in the middle of a cell: the trainer would hear a mere request to terminate when it is done."""
        self.process.kill()
        self.process.communicate()


def run_command(words: Sequence[str]) -> dict[str, Any]:
    """Run a command in this process and return its results.

    Raises:
        FailedError: with one line on what went wrong.
    """
    from sdprune.commands import run

    try:
        return run(words, summary=False)
    except (Exception, SystemExit) as error:
        if cause(error, KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from error
        bad = cause(error, InputError) or error
        raise FailedError(" ".join(str(bad).split()) or type(bad).__name__) from error


def run_process(words: Sequence[str]) -> dict[str, Any]:
    """Run a command in a process of its own, for cells that start further processes, each with the same words.

    Raises:
        FailedError: with one line on what went wrong.
    """
    done = subprocess.run([sys.executable, "-P", "-m", "sdprune.cli", *words], capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise FailedError(lines[-1].removeprefix("sdprune: ").removeprefix("error: ").removeprefix("failed: "))
    paths = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("results ")]
    if not paths:
        return {}
    with open(paths[0], encoding="utf-8") as file:
        return dict(json.load(file))


def _serve() -> None:
    """Answer tasks until the input ends. What a run prints goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    import sdprune.commands

    for line in sys.stdin:
        task, given = json.loads(line)
        try:
            results: Any = run_command(given) if task == "run" else sdprune.commands.check(given)
            answer = {"results": results}
        except FailedError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    try:
        _serve()
    except KeyboardInterrupt:
        sys.exit(130)
