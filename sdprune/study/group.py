"""Runs that may be compared with each other, and the cells of tables that they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from sdprune.study.methods import KINDS, NARROWED


class Cell(NamedTuple):
    """The methods and sparsities of both kinds of component; a dense one has no method."""

    text_method: str = ""
    text_sparsity: float = 0.0
    image_method: str = ""
    image_sparsity: float = 0.0

    @classmethod
    def of(cls, text_method: str, text: float, image: float, image_method: str = "magnitude") -> Cell:
        """Make a cell; the method of a component that is left dense does not matter."""
        return cls(text_method if text else "", text, image_method if image else "", image)


DENSE = Cell()
KEYS = list(Cell._fields)


class Study:
    """Runs of the same prompts, noise, sampling and protocol.

    Args:
        runs: rows of one group, of what `records.read` found.
    """

    def __init__(self, runs: pd.DataFrame) -> None:
        runs = runs.dropna(axis=1, how="all").sort_values([*KEYS, "directory"]).reset_index(drop=True)
        for kind in KINDS:
            runs[f"{kind}_choices"] = _varying_choices(runs, kind)
            named = runs[f"{kind}_choices"].radd(", ").where(runs[f"{kind}_choices"] != "", "")
            runs[f"{kind}_name"] = runs[f"{kind}_method"] + named
        self.runs = runs
        self.cells = {Cell(*key): same for key, same in runs.groupby(KEYS)}
        """The runs of each cell, whatever their other choices."""
        self.notes: list[str] = []
        """What a reader should know of these runs; tables and figures add to it, also the same line again."""
        self.shown: set[int] = set()
        """Rows of the runs that tables of single cells show."""
        for run, names in zip(runs["run"], runs["missing"], strict=True):
            for name in names:
                self.notes.append(f"{run}: {name} is not a finite number, it counts as missing")
        for _, same in runs.groupby("masks", sort=False):
            if len(same) > 1:
                names = _shortened(same["run"])
                self.notes.append(f"{names} have the same pruning; they differ in nothing that decides their scores")

    @property
    def dense(self) -> pd.Series | None:
        """The run without pruning. Where there are several, they have the same scores."""
        return self.cells[DENSE].iloc[0] if DENSE in self.cells else None

    def find(self, cell: Cell) -> pd.Series | None:
        """Return the run of a cell.

        Of several runs with different masks it returns the one that counts as the published code does, or None where
        that does not decide. A note says so in both cases.
        """
        if cell not in self.cells:
            return None
        found = self.cells[cell]
        if found["masks"].nunique() > 1:
            line = f"{len(found)} runs have the methods and sparsities of one cell ({_shortened(found['run'])})"
            found = found[found["text_published"] & found["image_published"]]
            if found["masks"].nunique() != 1:
                self.notes.append(
                    f"{line}: none is shown in tables of single runs; report them from directories of their own"
                )
                return None
            self.notes.append(f"{line}: shown is {found['run'].iloc[0]}, which counts as published (mode original)")
        self.shown.add(found.index[0])
        return found.iloc[0]

    def alone(self, kind: str) -> dict[str, pd.DataFrame]:
        """Return the runs that pruned one kind of component alone, by method and the choices that vary within it."""
        (other,) = set(KINDS) - {kind}
        dense = (self.runs[f"{other}_method"] == "") & (self.runs[f"{other}_sparsity"] == 0)
        unpruned = self.runs[f"{kind}_method"].isin(["", NARROWED]) & (self.runs[f"{kind}_sparsity"] == 0)
        return dict(iter(self.runs[dense & ~unpruned].groupby(f"{kind}_name")))


def number(run: pd.Series | None, name: str) -> float | None:
    """Return a number of a run, such as `metrics/fid`; None where the run or the number is missing."""
    value: Any = None if run is None else run.get(name)
    return None if value is None or pd.isna(value) else value


def _varying_choices(runs: pd.DataFrame, kind: str) -> pd.Series:
    """Name the choices of each run that vary among the runs of its method: `allocation m 5, mode original`."""
    choices = runs[sorted(column for column in runs if column.startswith(f"{kind}: "))]
    found = pd.Series("", index=runs.index)
    for _, same in choices.groupby(runs[f"{kind}_method"]):
        varying = same.loc[:, same.nunique(dropna=False) > 1].fillna("none")
        names = [column.removeprefix(f"{kind}: ") for column in varying]
        found[same.index] = [
            ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)) for values in varying.values
        ]
    return found


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
