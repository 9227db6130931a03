"""A W&B sweep file, run here without a server: every cell of its grid, one after another, finished ones skipped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdprune.configuration.shipped import located
from sdprune.errors import InputError, unknown
from sdprune.study.grid import cells, command, metric, read
from sdprune.study.runner import Runner, several_processes
from sdprune.study.usage import Flags, jobs
from sdprune.study.worker import Checked, Outcome

_ALIKE = 3  # failures of the same kind, and nothing else, that stop a sweep
_ROOTS = ("config", "seed_everything", "trainer", "model", "data", "wandb", "wandb_project", "wandb_group")
"""Options of the cells' verbs without a dot; here, since importing those verbs takes seconds."""
_INTERVAL = ("_low", "_high", "_se")


class Cell(NamedTuple):
    """A point of a grid."""

    file: Path
    number: int
    """In the file, from 1."""
    name: str
    """The values that vary: `unet.sparsity=0.2`."""
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
        InputError: a flag that there is not, a file that is no grid sweep, a wrong number of jobs.
    """
    own, options = _split(arguments)
    flags = Flags("sweep", ["--help", *(f"--{name}" for name in _ROOTS)])
    flags.add_argument("--jobs", type=jobs, default=1)
    flags.add_argument("--dry-run", action="store_true")
    given, places = flags.read(own)
    if not places:
        raise InputError("sdprune sweep wants a file, as in: sdprune sweep mini_sparsity.")
    todo, shared = _todo([located("sweep", "wandb_sweeps", place) for place in places], options)
    with Runner(min(given.jobs, len(todo)), any(several_processes(cell.words) for cell in todo)) as runner:
        checked = runner.check([cell.words for cell in todo])
        faults = [*_faults(todo, checked), *_unrecorded(todo, checked)]
        for line in faults:
            print(f"sdprune: error: {line}", file=sys.stderr)
        if faults:
            return 2
        if not given.dry_run:
            return _run(todo, [one.finished for one in checked], shared, runner, tell)
    for cell, one in zip(todo, checked, strict=True):
        tell(shlex.join(["sdprune", *cell.words]) + ("  # finished already" if one.finished else ""))
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sweep's own words, and the options of its cells, each with its value."""
    own: list[str] = []
    options: list[str] = []
    todo = list(words)
    while todo:
        word = todo.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or not ("." in name or name.strip("-+") in _ROOTS):
            own.append(word)
        elif equals or not todo or todo[0].startswith("--"):
            options.append(word)
        else:
            options.append(f"{word}={todo.pop(0)}")
    return own, options


def _todo(files: Iterable[Path], options: Sequence[str]) -> tuple[list[Cell], str]:
    """The cells, and what all of them have in common."""
    grids = {file: cells(file) for file in files}
    points = [point for grid in grids.values() for point in grid]
    names = dict.fromkeys(name for point in points for name in point)
    varying = [name for name in names if len({str(point.get(name)) for point in points}) > 1]
    todo = []
    for file, grid in grids.items():
        for number, point in enumerate(grid, 1):
            name = _named((key, point[key]) for key in varying if key in point) or file.stem
            todo.append(Cell(file, number, name, [*command(file, point), *_group(file, options), *options]))
    fixed = [(key, value) for key, value in points[0].items() if key not in varying] if points else []
    return todo, " ".join([_named(fixed), *(word.removeprefix("--") for word in options)]).strip()


def _named(values: Iterable[tuple[str, Any]]) -> str:
    return " ".join(f"{name}={value}".removeprefix("model.prune.") for name, value in values)


def _faults(todo: Sequence[Cell], checked: Sequence[Checked]) -> list[str]:
    """One line for each kind of fault, with the first cell that has it."""
    by: dict[tuple[Path, str], list[Cell]] = {}
    for cell, one in zip(todo, checked, strict=True):
        if one.fault is not None:
            by.setdefault((cell.file, one.fault), []).append(cell)
    lines = []
    for (file, fault), same in by.items():
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        lines.append(f"{file}, cell {same[0].number} ({same[0].name}){more}: {fault}")
    return lines


def _unrecorded(todo: Sequence[Cell], checked: Sequence[Checked]) -> list[str]:
    """One line for each file whose `metric:` is not among the numbers that its cells record."""
    lines = []
    for file in dict.fromkeys(cell.file for cell in todo):
        name, _ = metric(file)
        found = [one for cell, one in zip(todo, checked, strict=True) if cell.file == file]
        known = dict.fromkeys(number for one in found for number in one.numbers)
        if name is None or not known or any(one.fault for one in found):  # `fit` scores nothing
            continue
        plain = next((name.removesuffix(end) for end in _INTERVAL if name.endswith(end)), name)
        if not {name, plain} & set(known) and not name.startswith(tuple(one for one in known if one.endswith("/"))):
            choices = [number for number in known if not number.endswith("/")]
            lines.append(f"{file}: {unknown('metric', name, choices)}")
    return lines


def _run(
    todo: Sequence[Cell], finished: Sequence[bool], shared: str, runner: Runner, tell: Callable[[str], None]
) -> int:
    if shared:
        tell(f"In all cells: {shared}")
    outcomes: list[Outcome] = []
    for cell, before, outcome in zip(todo, finished, runner.run([cell.words for cell in todo]), strict=False):
        outcomes.append(outcome)
        told = _scores(outcome.results) if outcome.failure is None else f"failed: {outcome.failure}"
        already = "finished already, " if before and outcome.failure is None else ""
        tell(f"[{len(outcomes)}/{len(todo)}] {cell.name}: {already}{told}, {outcome.seconds:.0f} s")
        failures = [one.failure for one in outcomes]
        if len(todo) > _ALIKE == len(failures) and failures[0] is not None and len(set(failures)) == 1:
            tell(f"Stopped: the first {_ALIKE} cells failed alike. Mend the cause and run the same command again.")
            return 1
    for file in dict.fromkeys(cell.file for cell in todo):
        table = _table(file, [(cell, one) for cell, one in zip(todo, outcomes, strict=True) if cell.file == file])
        for line in table:
            tell(line)
    runs = dict.fromkeys(line.removeprefix("wandb sync ") for one in outcomes for line in one.wandb)
    if any(line.startswith("wandb sync ") for one in outcomes for line in one.wandb):
        tell(f"W&B        wandb sync {' '.join(map(shlex.quote, runs))}")
    failed = sum(outcome.failure is not None for outcome in outcomes)
    again = f", {failed} failed: run the same command again" if failed else ""
    tell(f"{len(todo) - failed} of {len(todo)} cells done{again}")
    return 1 if failed else 0


def _group(path: Path, options: Sequence[str]) -> list[str]:
    """The cells of a file are a group in W&B, where they are logged there."""
    wanted = any(word.startswith("--wandb") for word in options)
    return [f"--wandb_group={read(path).get('name', path.stem)}"] if wanted else []


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
    given, more = metric(file)
    name, sign = given or f"metrics/{next(iter(rows[0][1]['metrics']))}", -1 if more else 1
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
