"""Tables of runs, whichever study they belong to: all runs, those of no other table, drop-offs, comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch

from sdprune.metrics.paired import Interval, normal_interval
from sdprune.study.group import Cell, Study, number
from sdprune.study.methods import KINDS
from sdprune.study.text import escape

MISSING = "missing"


class Table(NamedTuple):
    """A table of texts: the name of its file, the title, the cells under their heads, and a line below."""

    name: str
    title: str
    cells: pd.DataFrame
    note: str = ""
    has_run: Sequence[bool] | None = None
    """For each row whether a run stands behind it; None where the rows are runs themselves."""
    shown: bool = True
    """Whether pages show it, and only its rows with runs; else it is folded, or in its CSV alone."""

    @property
    def rows(self) -> pd.DataFrame:
        """The rows that pages show."""
        return self.cells[list(self.has_run)] if self.has_run is not None and self.shown else self.cells

    @property
    def holds_words(self) -> list[bool]:
        """Whether each column holds words, which pages begin at the left: neither its head nor a cell is a number."""
        texts = [[head, *self.cells[head]] for head in self.cells]
        return [not any(re.match(r"[-+]?\d", text) for text in column) for column in texts]

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        head, *rows = [f"| {' | '.join(map(escape, row))} |" for row in (self.cells.columns, *self.rows.values)]
        lines = [f"### {escape(self.title)}", "", head, f"|{' --- |' * len(self.cells.columns)}", *rows]
        return "\n".join([*lines, "", *([escape(self.note), ""] if self.note else [])])


def rounded(value: float | None, digits: int = 3) -> str:
    """Write a number as tables show it."""
    return MISSING if value is None else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """Write a share as tables show it."""
    return f"{100 * value:.1f} %"


def difference(run: pd.Series | None, metric: str) -> str:
    """Write pruned minus dense with the 95 % interval; empty for the dense run and where it was not measured."""
    value, low, high = (number(run, f"comparison/{metric}_diff{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def everything(study: Study) -> Table:
    """List every run with all that was counted and measured."""
    runs = study.runs
    columns = {"run": runs["run"]}
    for kind in KINDS:
        columns |= {f"{kind} method": runs[f"{kind}_name"], kind: runs[f"{kind}_sparsity"].map("{:g}".format)}
    shares = ["nominal", "zeros of targets", "zeros of prunable", "zeros of pipeline"]
    columns |= {name: runs[name].map("{:.6f}".format) for name in shares}
    columns["n"] = runs["n"].map(str)
    for part in ("metrics/", "comparison/"):
        numbers = sorted(name for name in runs if name.startswith(part))
        columns |= {name: runs[name].map(lambda value: "" if pd.isna(value) else f"{value:.6g}") for name in numbers}
    cells = pd.DataFrame(columns)
    cells.columns = [re.sub("^(metrics|comparison)/", "", name) for name in cells]
    return Table("runs", "All runs", cells.rename(columns={"zeros of prunable": "zeros of components"}))


def others(study: Study) -> Table | None:
    """List the runs that no table of single cells shows, each with its scores."""
    runs = study.runs.drop(list(study.shown)).dropna(axis=1, how="all")
    if not len(runs):
        return None
    metrics = [name.removeprefix("metrics/") for name in runs if name.startswith("metrics/") and name[-3:] != "_se"]
    compared = [name for name in metrics if f"comparison/{name}_diff" in runs]
    rows = []
    for _, run in runs.iterrows():
        row = [run["run"]]
        for kind in KINDS:
            sparsity = run[f"{kind}_sparsity"]
            words = [run[f"{kind}_name"], percent(sparsity) if sparsity else ""]  # narrowed alone: no sparsity
            row.append(" ".join(filter(None, words)) or "dense")
        row += [percent(run["zeros of prunable"]), *(rounded(number(run, f"metrics/{name}")) for name in metrics)]
        rows.append([*row, *(difference(run, name) for name in compared)])
    columns = ["run", "text encoder", "image", "zeros", *metrics, *(f"{name} - dense" for name in compared)]
    note = "Differences are to the dense model, with 95 % intervals."
    return Table("others", "Runs that are no cells of the study", pd.DataFrame(rows, columns=columns), note)


def drop_offs(study: Study) -> Table:
    """Find the highest sparsity up to which the CLIP score, by its interval, surely lost no more than a share."""
    shares = (0.01, 0.02, 0.05)
    rows = [
        ["text encoder" if kind == "text" else kind, name, *(_last_within(study, runs, kind, one) for one in shares)]
        for kind in KINDS
        for name, runs in study.alone(kind).items()
    ]
    note = (
        "The highest measured sparsity at which, as at every lower one, the worse end of the CLIP score's interval "
        "lost at most this share of the dense score: what may be pruned safely, one component at a time."
    )
    columns = ["component", "method", *(f"{share:.0%}".replace("%", " %") for share in shares)]
    return Table("dropoffs", "Drop-off points", pd.DataFrame(rows, columns=columns), note)


def _last_within(study: Study, runs: pd.DataFrame, kind: str, tolerated: float) -> str:
    dense = number(study.dense, "metrics/clip_score")
    lows = runs.get("comparison/clip_score_diff_low", pd.Series(float("nan"), index=runs.index))
    last = None
    for sparsity, low in zip(runs[f"{kind}_sparsity"], lows, strict=True):
        if dense is None or pd.isna(low):
            return MISSING
        if low < -tolerated * dense:
            break
        last = sparsity
    return "below all" if last is None else percent(last)


def comparisons(study: Study, claims: Mapping[str, Iterable[tuple[Cell, Cell]]]) -> pd.DataFrame:
    """Count for each claim in how many pairs of cells the first has better CLIP scores on the same images."""
    rows = []
    for claim, pairs in claims.items():
        found = [one for one in (_interval(*map(study.find, pair)) for pair in pairs) if one is not None]
        better, worse = sum(one.low > 0 for one in found), sum(one.high < 0 for one in found)
        mean = f"{sum(one.estimate for one in found) / len(found):+.4f}" if found else MISSING
        rows.append([claim, *map(str, (len(found), better, worse, len(found) - better - worse)), mean])
    columns = ["the study says", "pairs", "for it", "against it", "undecided", "mean difference"]
    return pd.DataFrame(rows, columns=columns)


def _interval(*runs: pd.Series | None) -> Interval | None:
    """Return the interval of the difference of two runs' CLIP scores; None where one has none."""
    one, other = (None if run is None else run.get("clip_scores") for run in runs)
    if one is None or other is None or len(one) < 2:
        return None
    differences = torch.from_numpy(one - other)
    return normal_interval(float(differences.mean()), differences)
