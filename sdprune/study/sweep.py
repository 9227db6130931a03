"""A W&B sweep file, run here without a server: every cell of its grid, one after another, finished ones skipped."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sdprune.errors import InputError
from sdprune.record import read_json
from sdprune.study.usage import SWEEP as HELP


def cells(path: Path) -> list[dict[str, Any]]:
    """The grid's points, the last parameter varying fastest.

    Raises:
        InputError: the file is no grid sweep.
    """
    sweep = _read(path)
    if sweep.get("method") != "grid":
        raise InputError(f"{path} has method {sweep.get('method')!r}: only `grid` has cells; run it with wandb agent.")
    values = {}
    for name, given in sweep["parameters"].items():
        if not isinstance(given, Mapping) or not {"value", "values"} & set(given):
            raise InputError(f"{path}: parameter {name} has neither `value` nor `values`, which a grid needs.")
        values[name] = given["values"] if "values" in given else [given["value"]]
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def command(path: Path, cell: Mapping[str, Any]) -> list[str]:
    """The arguments of `sdprune` that the agent would give for a cell, without its W&B flag."""
    words = [str(word) for word in _read(path)["command"]]
    if "sdprune" not in words or "${args}" not in words:
        raise InputError(f"{path}: its command must contain sdprune and ${{args}}, got {words}.")
    arguments: list[str] = []
    for word in words[words.index("sdprune") + 1 :]:
        if word == "${args}":
            arguments += [f"--{name}={value}" for name, value in cell.items()]
        elif not word.startswith("--wandb"):
            arguments.append(word)
    return arguments


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the sweep {path}: {error.strerror}. Give a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The sweep {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or "command" not in sweep:
        raise InputError(f"{path} is no sweep: expected method, parameters and command.")
    return sweep


def run(arguments: Sequence[str], run_cell: Callable[[Sequence[str]], Any], tell: Callable[[str], None] = print) -> int:
    """Run all cells of the files named, and tell the scores of each.

    Args:
        arguments: of `sdprune sweep`.
        run_cell: runs the arguments of one cell and returns its results; an exception is a failed cell.
        tell: prints a line.

    Returns:
        The exit code.
    """
    files = [Path(word) for word in arguments if not word.startswith("--")]
    options = [word for word in arguments if word.startswith("--") and not word.startswith("--jobs")]
    if not files or "--help" in options:
        tell(HELP.rstrip())
        return 0
    jobs = _jobs([word for word in arguments if word.startswith("--jobs")])
    todo = [(cell, [*command(file, cell), *_group(file, options), *options]) for file in files for cell in cells(file)]
    apart = jobs > 1 or any(_several_processes(words) for _, words in todo)
    attempt = partial(_attempt, _start if apart else run_cell)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        commands = [words for _, words in todo]
        outcomes = (
            pool.map(attempt, commands) if jobs > 1 else map(attempt, commands)
        )  # the main thread can be interrupted
        for number, ((cell, _), (told, seconds)) in enumerate(zip(todo, outcomes, strict=True), 1):
            short = " ".join(f"{name.removeprefix('model.prune.')}={value}" for name, value in cell.items())
            failed += told.startswith("failed")
            tell(f"[{number}/{len(todo)}] {short}: {told}, {seconds:.0f} s")
    tell(
        f"{len(todo) - failed} of {len(todo)} cells done"
        + (f", {failed} failed: run the same command again" if failed else "")
    )
    return 1 if failed else 0


def _group(path: Path, options: Sequence[str]) -> list[str]:
    """The cells of a file are a group in W&B, where they are logged there."""
    wanted = any(word.startswith("--wandb") for word in options)
    return [f"--wandb_group={_read(path).get('name', path.stem)}"] if wanted else []


def _attempt(run_cell: Callable[[Sequence[str]], Any], words: Sequence[str]) -> tuple[str, float]:
    """What to say of a cell, and its seconds; one bad cell must not stop the others."""
    started = time.monotonic()
    try:
        told = _scores(run_cell(words))
    except Exception as error:
        told = f"failed: {' '.join(str(error).split())}"
    return told, time.monotonic() - started


def _several_processes(words: Sequence[str]) -> bool:
    """Whether a cell may start processes of its own, which would begin the whole sweep once more."""
    import torch

    asked = any(word.startswith(("--trainer.devices", "--trainer.num_nodes", "--trainer.strategy")) for word in words)
    return asked or torch.cuda.device_count() > 1


def _start(words: Sequence[str]) -> Any:
    """Run a cell in a process of its own."""
    done = subprocess.run([sys.executable, "-P", "-m", "sdprune.cli", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1].removeprefix("sdprune: "))
    paths = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("results ")]
    return read_json(Path(paths[0])) if paths else {}


def _jobs(given: Sequence[str]) -> int:
    value = given[-1].partition("=")[2] if given else "1"
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--jobs is {value!r}: give a number of 1 or more, as in --jobs=2.")
    return int(value)


def _scores(results: Mapping[str, Any]) -> str:
    if "infeasible" in results:
        return f"infeasible, {results['infeasible']}"
    if "metrics" not in results:  # of `fit`
        return "done"
    told = []
    for name, value in results["metrics"].items():
        if name.endswith("_se"):
            continue
        difference = results["comparison"].get(f"{name}_diff")
        told.append(f"{name} {value:.4f}" + (f" ({difference:+.4f})" if difference is not None else ""))
    return ", ".join(told)
