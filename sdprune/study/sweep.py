"""A W&B sweep file, run here without a server: every cell of its grid, one after another, finished ones skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from sdprune.errors import InputError

HELP = """usage: sdprune sweep FILE [FILE ...] [--option=value ...]

Run every cell of W&B sweep files (method: grid) here, without a server. Each cell is the command that `wandb agent`
would start, without --wandb; options given here are added to all of them. A finished cell is not run again, and one
that failed is tried again, when the same command is given again.

  sdprune sweep wandb_sweeps/mini_methods_unet.yaml --data.n=64

Exit code: 0 when every cell is done, else 1.
"""


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
    options = [word for word in arguments if word.startswith("--")]
    if not files or "--help" in options:
        tell(HELP.rstrip())
        return 0
    todo = [(file, cell) for file in files for cell in cells(file)]
    commands = [[*command(file, cell), *options] for file, cell in todo]
    failed = 0
    for number, ((_, cell), words) in enumerate(zip(todo, commands, strict=True), 1):
        short = " ".join(f"{name.removeprefix('model.prune.')}={value}" for name, value in cell.items())
        started = time.monotonic()
        try:
            results = run_cell(words)
        except Exception as error:  # one bad cell must not stop the others
            failed += 1
            tell(f"[{number}/{len(todo)}] {short}: failed: {' '.join(str(error).split())}")
            continue
        tell(f"[{number}/{len(todo)}] {short}: {_scores(results)}, {time.monotonic() - started:.0f} s")
    tell(
        f"{len(todo) - failed} of {len(todo)} cells done"
        + (f", {failed} failed: run the same command again" if failed else "")
    )
    return 1 if failed else 0


def _scores(results: Mapping[str, Any]) -> str:
    if "infeasible" in results:
        return f"infeasible, {results['infeasible']}"
    told = []
    for name, value in results["metrics"].items():
        if name.endswith("_se"):
            continue
        difference = results["comparison"].get(f"{name}_diff")
        told.append(f"{name} {value:.4f}" + (f" ({difference:+.4f})" if difference is not None else ""))
    return ", ".join(told)
