"""Runs that may be compared with each other, told apart by everything that decides their masks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sdprune.pruning import Budget, InfeasibleError, Size
from sdprune.study.records import DENSE, Pruned, Run


class Line(NamedTuple):
    """Runs that pruned one component alone and differ in the sparsity only."""

    method: str
    """Such as `owl_wanda`."""
    name: str
    """The method, and the choices by which several lines of this method differ: `owl_wanda, allocation m 5`."""
    runs: list[Run]
    """By sparsity."""


class Study:
    """Runs of the same prompts, noise, sampling and protocol.

    Args:
        runs: of one kind.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: (run.key, str(run.directory)))
        self._notes = dict.fromkeys(f"{run.name}: {note}" for run in self.runs for note in run.notes)
        groups: dict[tuple[bool, str], list[Run]] = {}
        same: dict[str, list[Run]] = {}
        for run in self.runs:
            same.setdefault(run.identity, []).append(run)
            for text in (True, False):
                groups.setdefault((text, run.component(text).pruned.method), []).append(run)
        self.shown: set[Path] = set()
        """Directories of the runs that tables of single cells show."""
        self._varying = {group: _varying(found, group[0]) for group, found in groups.items()}
        for found in same.values():
            if len(found) > 1:
                self.note(f"{_names(found)} have the same pruning; they differ in nothing that decides their scores")

    def note(self, line: str) -> None:
        """Keep a line that the report ends with."""
        self._notes[line] = None

    @property
    def notes(self) -> list[str]:
        """What a reader should know of these runs, each once; tables and figures add to it."""
        return list(self._notes)

    @cached_property
    def dense(self) -> Run | None:
        """The run without pruning; where there are several, they have the same scores."""
        return next((run for run in self.runs if run.key == (DENSE, DENSE)), None)

    def name(self, run: Run, text: bool) -> str:
        """How a component was pruned: the method, and those of its other choices that vary among this method's runs."""
        part = run.component(text)
        varying = self._varying[text, part.pruned.method]
        return ", ".join([part.pruned.method, *(f"{key} {part.choices.get(key, 'none')}" for key in varying)])

    def candidates(self, text: Pruned, image: Pruned) -> list[Run]:
        """The runs that were pruned by these methods to these sparsities, whatever their other choices."""
        wanted = (text if text.sparsity else DENSE, image if image.sparsity else DENSE)
        return [run for run in self.runs if run.key == wanted]

    def find(self, text: Pruned, image: Pruned) -> Run | None:
        """The run that was pruned so.

        Of several with different masks it is the one that counts as the published code does; where that does not
        decide, none. A note says so in both cases.
        """
        found = self.candidates(text, image)
        if len({run.identity for run in found}) < 2:
            return self._showing(found[0]) if found else None
        original = [run for run in found if run.original]
        told = f"{len(found)} runs have the methods and sparsities of one cell ({_names(found)})"
        if len({run.identity for run in original}) == 1:
            self.note(f"{told}: shown is {original[0].name}, which counts as published (mode original)")
            return self._showing(original[0])
        self.note(f"{told}: none is shown in tables of single runs; report them from directories of their own")
        return None

    def _showing(self, run: Run) -> Run:
        self.shown.add(run.directory)
        return run

    def alone(self, text: bool) -> list[Line]:
        """The runs that pruned one component alone."""
        found: dict[str, Line] = {}
        for run in self.runs:
            if run.component(text).pruned != DENSE and run.component(not text).pruned == DENSE:
                name = self.name(run, text)
                found.setdefault(name, Line(run.component(text).pruned.method, name, [])).runs.append(run)
        return sorted(found.values(), key=lambda line: line.name)

    @property
    def sizes(self) -> dict[str, Size]:
        """Of the prunable components, as the first run counted."""
        return {name: Size(parameters, 0) for name, parameters in self.runs[0].sizes.items()}

    @property
    def is_sd2(self) -> bool:
        """Whether the model is of Stable Diffusion 2's size, so that published values may stand beside."""
        return {size.parameters for size in self.sizes.values()} == {340_387_840, 865_910_724}

    def split(self, total: float, text_share: float) -> tuple[float, float] | None:
        """The sparsities of text encoder and U-Net by the study's Table 1; None where infeasible."""
        text = self.runs[0].text_encoders
        try:
            found = Budget(total, text_share).sparsities(self.sizes, text)
        except InfeasibleError:
            return None
        return found[text[0]], next(value for name, value in found.items() if name not in text)

    @property
    def title(self) -> str:
        """One line on what all runs share."""
        return self.runs[0].title


def _varying(runs: Iterable[Run], text: bool) -> list[str]:
    """Names of the choices that differ among runs."""
    choices = [run.component(text).choices for run in runs]
    names = sorted({name for one in choices for name in one})
    return [name for name in names if len({one.get(name) for one in choices}) > 1]


def _names(runs: list[Run]) -> str:
    return ", ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
