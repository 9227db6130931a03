"""W&B's sweep files: the points of a grid, and the command of each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from sdprune.errors import InputError, unknown


def cells(path: Path) -> list[dict[str, Any]]:
    """The grid's points, the last parameter varying fastest.

    Raises:
        InputError: the file is no grid sweep.
    """
    sweep = read(path)
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
    words = [str(word) for word in read(path)["command"]]
    if "sdprune" not in words or "${args}" not in words:
        raise InputError(f"{path}: its command must contain sdprune and ${{args}}, got {words}.")
    arguments: list[str] = []
    for word in words[words.index("sdprune") + 1 :]:
        if word == "${args}":
            arguments += [f"--{name}={value}" for name, value in cell.items()]
        elif not word.startswith("--wandb"):
            arguments.append(word)
    return arguments


def metric(path: Path) -> tuple[str | None, bool]:
    """What the cells are ordered by, as W&B names it, and whether more of it is better.

    Raises:
        InputError: it is not as W&B has it.
    """
    given = read(path).get("metric") or {}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), (str, type(None))):
        raise InputError(f"{path}: its metric is {given!r}: give {{name: comparison/fid_diff, goal: minimize}}.")
    goal = given.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise unknown(f"goal of the metric in {path}", goal, ("minimize", "maximize"))
    return given.get("name"), goal == "maximize"


def read(path: Path) -> dict[str, Any]:
    """A sweep file's content.

    Raises:
        InputError: it cannot be read, or is no sweep.
    """
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
