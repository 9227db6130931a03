"""W&B's sweep files: the points of a grid, and the command of each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sdprune.errors import InputError, unknown


class Grid:
    """A sweep file with `method: grid`.

    Attributes:
        path: of the file.
        name: of the sweep.
        points: values by parameter, the last parameter varying fastest.
        metric: what the cells are ordered by, as W&B names it, if the file says so.
        maximize: whether more of it is better.

    Raises:
        InputError: the file cannot be read, or is no grid sweep as W&B has it.
    """

    def __init__(self, path: Path) -> None:
        sweep = _read(path)
        if sweep.get("method") != "grid":
            method = sweep.get("method")
            raise InputError(f"{path} has method {method!r}: only `grid` has cells; run it with wandb agent.")
        values = {}
        for name, given in sweep["parameters"].items():
            if not isinstance(given, Mapping) or not {"value", "values"} & set(given):
                raise InputError(f"{path}: parameter {name} has neither `value` nor `values`, which a grid needs.")
            values[name] = given["values"] if "values" in given else [given["value"]]
            if not isinstance(values[name], list) or not values[name]:
                raise InputError(f"{path}: parameter {name} has values {values[name]!r}: give a list, as in [0.2].")
        self.path, self.name = path, sweep.get("name", path.stem)
        self.points = [dict(zip(values, point, strict=True)) for point in product(*values.values())]
        self.words = [str(word) for word in sweep["command"]]
        if "sdprune" not in self.words or "${args}" not in self.words:
            raise InputError(f"{path}: its command must contain sdprune and ${{args}}, got {self.words}.")
        metric = sweep.get("metric") or {}
        if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), (str, type(None))):
            raise InputError(f"{path}: its metric is {metric!r}: give {{name: comparison/fid_diff, goal: minimize}}.")
        goal = metric.get("goal", "minimize")
        if goal not in ("minimize", "maximize"):
            raise unknown(f"goal of the metric in {path}", goal, ("minimize", "maximize"))
        self.metric, self.maximize = metric.get("name"), goal == "maximize"

    def command(self, point: Mapping[str, Any]) -> list[str]:
        """Return the arguments of `sdprune` that the agent would give for a point, without its W&B flag."""
        arguments: list[str] = []
        for word in self.words[self.words.index("sdprune") + 1 :]:
            if word == "${args}":
                arguments += [f"--{name}={value}" for name, value in point.items()]
            elif not word.startswith("--wandb"):
                arguments.append(word)
        return arguments


def _read(path: Path) -> dict[str, Any]:
    try:
        sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the sweep {path}: {error.strerror}. Give a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The sweep {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or "command" not in sweep:
        raise InputError(f"{path} is no sweep: expected method, parameters and command.")
    return sweep
