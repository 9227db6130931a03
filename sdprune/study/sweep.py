"""A W&B sweep file, run here without a server: every cell of its grid, one after another, finished ones skipped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdprune.configuration.quiet import quiet
from sdprune.configuration.shipped import located
from sdprune.errors import unknown
from sdprune.study.grid import Grid
from sdprune.study.runner import Outcome, run_all
from sdprune.study.usage import CELL_OPTIONS, SWEEP

if TYPE_CHECKING:
    from sdprune.configuration.checking import Checked

_ALIKE = 3  # failures of the same kind, and nothing else, that stop a sweep
_INTERVAL = ("_low", "_high", "_se")


class Cell(NamedTuple):
    """A point of a grid: its number in the file from 1, the values that vary, the command without `sdprune`."""

    grid: Grid
    number: int
    name: str
    words: list[str]


def run(arguments: Sequence[str]) -> int:
    """Run all cells that these arguments of `sdprune sweep` name, print their scores, and return the exit code.

    Raises:
        InputError: an unknown flag, a file that is no grid sweep, a wrong number of jobs.
    """
    flags, options = _split(arguments)
    given = SWEEP.parse(flags, CELL_OPTIONS)
    grids = [Grid(path) for path in dict.fromkeys(located("sweep", "wandb_sweeps", file) for file in given.files)]
    cells, shared = _cells(grids, options)
    quiet()
    from sdprune.configuration.checking import check

    checked = check([cell.words for cell in cells])
    faults = [*_faults(cells, checked), *(line for grid in grids for line in _unrecorded(grid, cells, checked))]
    for line in faults:
        print(f"sdprune: error: {line}", file=sys.stderr)
    if faults:
        return 2
    if not given.dry_run:
        if shared:
            print(f"In all cells: {shared}")
        return _run(grids, cells, [one.finished for one in checked], min(given.jobs, len(cells)))
    for cell, one in zip(cells, checked, strict=True):
        print(shlex.join(["sdprune", *cell.words]) + ("  # finished already" if one.finished else ""))
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the arguments of the sweep itself from the options of its cells, each joined with its value."""
    flags: list[str] = []
    options: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or not ("." in name or name.strip("-+") in CELL_OPTIONS):
            flags.append(word)
        elif equals or not words or words[0].startswith("--"):
            options.append(word)
        else:
            options.append(f"{word}={words.pop(0)}")
    return flags, options


def _cells(grids: Sequence[Grid], options: Sequence[str]) -> tuple[list[Cell], str]:
    """List the cells of all grids, and write what all of them have in common."""
    points = [point for grid in grids for point in grid.points]
    names = dict.fromkeys(name for point in points for name in point)
    varying = [name for name in names if len({str(point.get(name)) for point in points}) > 1]
    logged = any(word.startswith("--wandb") for word in options)
    cells = []
    for grid in grids:
        group = [f"--wandb_group={grid.name}"] if logged else []
        for number, point in enumerate(grid.points, 1):
            name = _named((key, point[key]) for key in varying if key in point) or grid.path.stem
            cells.append(Cell(grid, number, name, [*grid.command(point), *group, *options]))
    fixed = [(key, value) for key, value in points[0].items() if key not in varying] if points else []
    return cells, " ".join([_named(fixed), *(word.removeprefix("--") for word in options)]).strip()


def _named(values: Iterable[tuple[str, Any]]) -> str:
    return " ".join(f"{name}={value}".removeprefix("model.prune.") for name, value in values)


def _faults(cells: Sequence[Cell], checked: Sequence[Checked]) -> list[str]:
    """Write one line for each kind of fault, with the first cell that has it."""
    found: dict[tuple[Path, str], list[Cell]] = {}
    for cell, one in zip(cells, checked, strict=True):
        if one.fault is not None:
            found.setdefault((cell.grid.path, one.fault), []).append(cell)
    lines = []
    for (path, fault), (first, *others) in found.items():
        more = f" and {len(others)} more" if others else ""
        lines.append(f"{path}, cell {first.number} ({first.name}){more}: {fault}")
    return lines


def _unrecorded(grid: Grid, cells: Sequence[Cell], checked: Sequence[Checked]) -> list[str]:
    """Write one line where a file's `metric:` is not among the numbers that its cells record."""
    found = [one for cell, one in zip(cells, checked, strict=True) if cell.grid is grid]
    known = dict.fromkeys(number for one in found for number in one.numbers)
    name = grid.metric
    if name is None or not known or any(one.fault for one in found):  # `fit` scores nothing
        return []
    if name.startswith("comparison/") and not any(one.startswith("comparison/") for one in known):
        return []  # where nothing is pruned, nothing is compared
    plain = next((name.removesuffix(end) for end in _INTERVAL if name.endswith(end)), name)
    if {name, plain} & set(known) or name.startswith(tuple(one for one in known if one.endswith("/"))):
        return []
    choices = [number for number in known if not number.endswith("/")]
    return [f"{grid.path}: {unknown('metric', name, choices)}"]


def _run(grids: Sequence[Grid], cells: Sequence[Cell], finished: Sequence[bool], jobs: int) -> int:
    outcomes: list[Outcome] = []
    with closing(run_all([cell.words for cell in cells], jobs)) as running:
        for cell, before, outcome in zip(cells, finished, running, strict=True):
            outcomes.append(outcome)
            line = _scores(outcome.results) if outcome.failure is None else f"failed: {outcome.failure}"
            already = "finished already, " if before and outcome.failure is None else ""
            print(f"[{len(outcomes)}/{len(cells)}] {cell.name}: {already}{line}, {outcome.seconds:.0f} s")
            failures = [one.failure for one in outcomes]
            if len(cells) > _ALIKE == len(failures) and failures[0] is not None and len(set(failures)) == 1:
                print(f"Stopped: the first {_ALIKE} cells failed alike. Mend the cause and run the same command again.")
                return 1
    for grid in grids:
        found = [(cell.name, one.results) for cell, one in zip(cells, outcomes, strict=True) if cell.grid is grid]
        print(_table(grid, [(name, results) for name, results in found if results.get("metrics")]), end="")
    offline = [line for one in outcomes for line in one.wandb if line.startswith("wandb sync ")]
    if offline:
        runs = dict.fromkeys(line.removeprefix("wandb sync ") for line in offline)
        print(f"W&B        wandb sync {' '.join(map(shlex.quote, runs))}")
    failed = sum(outcome.failure is not None for outcome in outcomes)
    again = f", {failed} failed: run the same command again" if failed else ""
    print(f"{len(cells) - failed} of {len(cells)} cells done{again}")
    return 1 if failed else 0


def _scores(results: Mapping[str, Any]) -> str:
    if "infeasible" in results:
        return f"infeasible, {results['infeasible']}"
    if "metrics" not in results:  # of `fit`
        return "done"
    scores = []
    for name, value in results["metrics"].items():
        if name.endswith("_se"):
            continue
        difference = results["comparison"].get(f"{name}_diff")
        scores.append(f"{name} {value:.4f}" + (f" ({difference:+.4f})" if difference is not None else ""))
    return ", ".join(scores)


def _table(grid: Grid, scored: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Write a grid's scored cells, the best first, by what its `metric:` names; nothing for fewer than two."""
    if len(scored) < 2:
        return ""
    import pandas as pd

    table = pd.json_normalize([results for _, results in scored], sep="/")
    table["cell"] = [name for name, _ in scored]
    scores = [name for name in table if name.startswith("metrics/") and not name.endswith("_se")]
    name = grid.metric or scores[0]
    table = table.reindex(columns=list(dict.fromkeys([name, *scores, "cell"])))
    table = table.sort_values(name, ascending=not grid.maximize, kind="stable")
    table.columns = [head.removeprefix("metrics/").removeprefix("comparison/") for head in table]
    left = f"{{:<{max(map(len, table['cell']))}}}".format
    text = table.to_string(index=False, na_rep="-", float_format="{:.4f}".format, formatters={"cell": left})
    return f"{grid.path.name}, by {name}, the best first\n{text}\n"
