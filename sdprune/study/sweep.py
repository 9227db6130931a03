"""A W&B sweep file, run here without a server: every cell of its grid, one after another, finished ones skipped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdprune.errors import InputError
from sdprune.study.grid import cells, command, read
from sdprune.study.runner import Outcome, Runner, several_processes
from sdprune.study.usage import SWEEP as HELP

_ALIKE = 3  # failures of the same kind, and nothing else, that stop a sweep


class Cell(NamedTuple):
    """A point of a grid."""

    file: Path
    number: int
    """In the file, from 1."""
    name: str
    """Its values, and the options given to all: `unet.sparsity=0.2 data.n=64`."""
    words: list[str]
    """The command, without `sdprune`."""


def run(arguments: Sequence[str], tell: Callable[[str], None] = print) -> int:
    """Run all cells of the files named, and tell the scores of each.

    Args:
        arguments: of `sdprune sweep`.
        tell: prints a line.

    Returns:
        The exit code.

    Raises:
        InputError: a file that is no grid sweep, a wrong number of jobs.
    """
    files = [Path(word) for word in arguments if not word.startswith("--")]
    options = [word for word in arguments if word.startswith("--") and not word.startswith("--jobs")]
    if not files or "--help" in options:
        tell(HELP.rstrip())
        return 0
    jobs = _jobs([word for word in arguments if word.startswith("--jobs")])
    dry = "--dry-run" in options
    todo = _todo(files, [word for word in options if word != "--dry-run"])
    if dry:
        for cell in todo:
            tell(shlex.join(["sdprune", *cell.words]))
    with Runner(min(jobs, len(todo)), any(several_processes(cell.words) for cell in todo)) as runner:
        faults = _faults(todo, runner.check([cell.words for cell in todo]))
        for line in faults:
            print(f"sdprune: error: {line}", file=sys.stderr)
        if faults or dry:
            return 2 if faults else 0
        return _run(todo, runner, tell)


def _todo(files: Iterable[Path], options: Sequence[str]) -> list[Cell]:
    return [
        Cell(file, number, _name(cell, options), [*command(file, cell), *_group(file, options), *options])
        for file in files
        for number, cell in enumerate(cells(file), 1)
    ]


def _name(cell: Mapping[str, Any], options: Sequence[str]) -> str:
    words = [f"{name}={value}" for name, value in cell.items()] + [word.removeprefix("--") for word in options]
    return " ".join(word.removeprefix("model.prune.") for word in words)


def _faults(todo: Sequence[Cell], found: Sequence[str | None]) -> list[str]:
    """One line for each kind of fault, with the first cell that has it."""
    by: dict[tuple[Path, str], list[Cell]] = {}
    for cell, fault in zip(todo, found, strict=True):
        if fault is not None:
            by.setdefault((cell.file, fault), []).append(cell)
    lines = []
    for (file, fault), same in by.items():
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        lines.append(f"{file}, cell {same[0].number} ({same[0].name}){more}: {fault}")
    return lines


def _run(todo: Sequence[Cell], runner: Runner, tell: Callable[[str], None]) -> int:
    outcomes: list[Outcome] = []
    for cell, outcome in zip(todo, runner.run([cell.words for cell in todo]), strict=False):
        outcomes.append(outcome)
        told = _scores(outcome.results) if outcome.failure is None else f"failed: {outcome.failure}"
        tell(f"[{len(outcomes)}/{len(todo)}] {cell.name}: {told}, {outcome.seconds:.0f} s")
        failures = [one.failure for one in outcomes]
        if len(todo) > _ALIKE == len(failures) and failures[0] is not None and len(set(failures)) == 1:
            tell(f"Stopped: the first {_ALIKE} cells failed alike. Mend the cause and run the same command again.")
            return 1
    for file in dict.fromkeys(cell.file for cell in todo):
        table = _table(file, [(cell, one) for cell, one in zip(todo, outcomes, strict=True) if cell.file == file])
        for line in table:
            tell(line)
    failed = sum(outcome.failure is not None for outcome in outcomes)
    again = f", {failed} failed: run the same command again" if failed else ""
    tell(f"{len(todo) - failed} of {len(todo)} cells done{again}")
    return 1 if failed else 0


def _group(path: Path, options: Sequence[str]) -> list[str]:
    """The cells of a file are a group in W&B, where they are logged there."""
    wanted = any(word.startswith("--wandb") for word in options)
    return [f"--wandb_group={read(path).get('name', path.stem)}"] if wanted else []


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


def _table(file: Path, found: Sequence[tuple[Cell, Outcome]]) -> list[str]:
    """Lines of a table of one file's scored cells, the best first, by what the file's `metric:` names."""
    rows = [(cell, one.results) for cell, one in found if one.results.get("metrics")]
    if len(rows) < 2:
        return []
    metric = read(file).get("metric") or {}
    name = str(metric.get("name") or f"metrics/{next(iter(rows[0][1]['metrics']))}")
    sign = -1 if metric.get("goal") == "maximize" else 1
    values = [_value(results, name) for _, results in rows]
    order = sorted(range(len(rows)), key=lambda place: (values[place] is None, sign * (values[place] or 0.0)))
    scores = [score for score in rows[0][1]["metrics"] if not score.endswith("_se")]
    heads = list(dict.fromkeys([name, *(f"metrics/{score}" for score in scores)]))
    lines = [[head.removeprefix("metrics/").removeprefix("comparison/") for head in heads] + ["cell"]]
    for place in order:
        cell, results = rows[place]
        numbers = [_value(results, head) for head in heads]
        lines.append([*("-" if number is None else f"{number:.4f}" for number in numbers), cell.name])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    shown = ["  ".join([*(f"{text:>{w}}" for text, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return [f"{file.name}, by {name}, the best first", *shown]


def _value(results: Mapping[str, Any], name: str) -> float | None:
    """A number of the results by its name in W&B, such as `comparison/fid_diff`."""
    value: Any = results
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, (int, float)) else None
