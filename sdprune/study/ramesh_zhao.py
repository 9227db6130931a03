"""Ramesh & Zhao's study: which pairs of sparsities its tables and figures show, what it claims, what it published.

Source: Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from sdprune.errors import InputError
from sdprune.pruning import Budget, InfeasibleError, Size
from sdprune.study import figures, sensitivity, tables
from sdprune.study.figures import Figure
from sdprune.study.group import DENSE, Cell, Study, number
from sdprune.study.methods import NARROWED
from sdprune.study.tables import MISSING, Table, difference, percent, rounded

TOTALS, SHARES = (0.2, 0.3, 0.4, 0.5, 0.6), (0.75, 0.5, 0.25)
STEPS = tuple((round(0.625 - i * 0.025, 4), round(0.5 - i * 0.025, 4)) for i in range(9))
"""Sparsities of text encoder and U-Net, down from the drop-off points."""
_METRICS = (("fid", "FID", 2), ("clip_score", "CLIP score", 3))
_NAMES = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "owl": "OWL", "sensitivity": "Sensitivity"}

Scores = dict[Cell, list[float]]
"""Results of others: FID and CLIP score by cell."""


def load_reference(path: Path) -> Scores:
    """Read a CSV with text_method, unet_method, text_sparsity, unet_sparsity, fid and clip_score.

    Raises:
        InputError: it cannot be read, or has not these columns.
    """
    columns = ["text_sparsity", "unet_sparsity", "fid", "clip_score"]
    try:
        rows = pd.read_csv(path, index_col=False, dtype=str, keep_default_na=False)
        numbers, methods = rows[columns].astype(float), rows[["text_method", "unet_method"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no file of results ({type(error).__name__}: {error}): expected a CSV with text_method, "
            "unet_method, text_sparsity, unet_sparsity, fid and clip_score."
        ) from error
    scores: Scores = {}
    for (text_method, image_method), (text, image, *found) in zip(methods.values, numbers.values, strict=True):
        scores.setdefault(Cell.of(text_method, round(text, 4), round(image, 4), image_method), found)
    return scores


def published(study: Study) -> dict[str, Scores]:
    """Return the study's Tables 2, 5, 6, 9 and 10 for runs of Stable Diffusion 2, by the name of their columns."""
    is_sd2 = set(study.runs["sizes"].iloc[0].values()) == {340_387_840, 865_910_724}
    path = Path(str(files("sdprune.study") / "published_tables.csv"))
    return {"published": load_reference(path)} if is_sd2 else {}


def split(study: Study, total: float, text_share: float) -> tuple[float, float] | None:
    """Return the sparsities of text encoder and U-Net by the study's Table 1; None where infeasible."""
    sizes, text = study.runs.loc[0, ["sizes", "text_encoders"]]
    try:
        found = Budget(total, text_share).sparsities({name: Size(one, 0) for name, one in sizes.items()}, text)
    except InfeasibleError:
        return None
    return found[text[0]], next(value for name, value in found.items() if name not in text)


def report_tables(study: Study, references: Mapping[str, Scores]) -> list[Table]:
    """Make the table of runs that are no cells of the study, Tables 1 to 10, and those of what else is known."""
    splits = {pair: split(study, *pair) for pair in product(TOTALS, SHARES)}
    best = [Cell.of("owl_magnitude", 0.6, 0.0), Cell.of("magnitude", 0.0, 0.4)]
    made = [_list(study, references, "2", "The best models with one component pruned", best)]
    for first, method, words in (
        (3, "magnitude", "magnitude"), (7, "owl_magnitude", "magnitude, with OWL on the text encoder"),
    ):  # fmt: skip
        for offset, (metric, name, digits) in enumerate(_METRICS):
            title = f"{name} by total and text : image share, {words}"
            made.append(_matrix(study, str(first + offset), title, metric, digits, splits, method))
        cells = [Cell.of(method, *pair) for pair in splits.values() if pair is not None]
        made.append(_list(study, references, str(first + 2), f"A total shared out in three ways, {words}", cells))
        cells = [Cell.of(method, *pair) for pair in ((0.0, 0.0), *STEPS)]
        title = f"Both components, down from the drop-off points, {words}"
        made.append(_list(study, references, str(first + 3), title, cells))
    made.insert(0, _budgets(splits, any(one.shown for one in made if one.name[5:] in ("3", "4", "5", "7", "8", "9"))))
    other = tables.others(study)  # before the claims look for pairs
    made = [*([other] if other else []), *made, *sensitivity.tables(study)]
    return [*made, tables.drop_offs(study), _findings(study, splits), tables.everything(study)]


def _table(number: str, title: str, cells: pd.DataFrame, *rest: Any, **more: Any) -> Table:
    return Table(f"table{number}", f"Table {number}. {title}", cells, *rest, **more)


Splits = dict[tuple[float, float], tuple[float, float] | None]


def _budgets(splits: Splits, shown: bool) -> Table:
    rows = []
    for (total, share), found in splits.items():
        ratio = f"{share * 100:.0f}:{100 - share * 100:.0f}"
        rows.append([f"{total:.0%}", ratio, *(["infeasible"] * 2 if found is None else [f"{s:.0%}" for s in found])])
    note = "By the parameters of this model's components: s_text = total * share * (P_text + P_unet) / P_text."
    cells = pd.DataFrame(rows, columns=["total", "text : image", "text", "image"])
    return _table("1", "Sparsities by total and share", cells, note, shown=shown)


def _score(study: Study, cell: Cell, metric: str, digits: int) -> str:
    """Return the score of a cell's run; where several runs belong to the cell, their number."""
    run = study.find(cell)
    if run is None and cell in study.cells:
        return f"{len(study.cells[cell])} runs"
    return rounded(number(run, f"metrics/{metric}"), digits)


def _matrix(study: Study, table: str, title: str, metric: str, digits: int, splits: Splits, method: str) -> Table:
    rows, has_run = [], []
    for total in TOTALS:
        cells = [None if one is None else Cell.of(method, *one) for one in (splits[total, share] for share in SHARES)]
        rows.append([f"{total:.0%}", *("N/A" if one is None else _score(study, one, metric, digits) for one in cells)])
        has_run.append(any(one in study.cells for one in cells))
    found = pd.DataFrame(rows, columns=["total", "75:25", "50:50", "25:75"])
    return _table(table, title, found, has_run=has_run, shown=any(has_run))


def _list(study: Study, references: Mapping[str, Scores], table: str, title: str, cells: Sequence[Cell]) -> Table:
    """Make a row for each cell: its run, the scores of others, the choices that vary among the runs of its methods."""
    found = pd.DataFrame([_row(study, references, cell) for cell in cells])
    if not found["choices"].any():
        del found["choices"]
    has_run = [cell in study.cells for cell in cells]
    shown = any(ran for cell, ran in zip(cells, has_run, strict=True) if cell != DENSE)
    return _table(table, title, found, has_run=has_run, shown=shown)


def _row(study: Study, references: Mapping[str, Scores], cell: Cell) -> dict[str, str]:
    run = study.find(cell)
    row = {
        "nominal": MISSING if run is None else percent(run["nominal"]),
        "zeros": MISSING if run is None else percent(run["zeros of prunable"]),
        "text": percent(cell.text_sparsity),
        "image": percent(cell.image_sparsity),
        **{name: _score(study, cell, metric, digits) for metric, name, digits in _METRICS},
        **{f"{name} - dense": difference(run, metric) for metric, name, _ in _METRICS},
    }
    for source, reference in references.items():
        scores = reference.get(cell, [None, None])
        for (_, name, digits), score in zip(_METRICS, scores, strict=True):
            row[f"{name} {source}"] = rounded(score, digits)
        for (metric, name, digits), score in zip(_METRICS, scores, strict=True):
            ours = number(run, f"metrics/{metric}")
            change = "" if ours is None or score is None else f"{ours - score:+.{digits}f}"
            row[f"{name} - {source}"] = change
    words = [] if run is None else [(kind, run[f"{kind}_choices"]) for kind in ("text", "image")]
    return row | {"choices": "; ".join(f"{kind}: {choices}" for kind, choices in words if choices)}


def _findings(study: Study, splits: Splits) -> Table:
    """Test each claim of the study by paired comparisons of two models' CLIP scores over the same images."""

    def same_sparsity(one: str, other: str) -> list[tuple[Cell, Cell]]:
        found = sorted(cell for cell in study.cells if cell == Cell(one, cell.text_sparsity))
        return [(cell, cell._replace(text_method=other)) for cell in found]

    def shares(one: float, other: float) -> list[tuple[Cell, Cell]]:
        found = [(splits[total, one], splits[total, other]) for total in TOTALS]
        return [(Cell.of("magnitude", *a), Cell.of("magnitude", *b)) for a, b in found if a and b]

    joint = [Cell.of("magnitude", *pair) for pair in STEPS]
    claims = {
        "Text encoder: magnitude is better than Wanda": same_sparsity("magnitude", "wanda"),
        "Text encoder: OWL improves magnitude": same_sparsity("owl_magnitude", "magnitude"),
        "Text encoder: OWL improves Wanda": same_sparsity("owl_wanda", "wanda"),
        "A total is better spent 25:75 than 50:50": shares(0.25, 0.5),
        "A total is better spent 25:75 than 75:25": shares(0.25, 0.75),
        "Pruning both loses more than the text encoder alone": [
            (Cell(one.text_method, one.text_sparsity), one) for one in joint
        ],
        "Pruning both loses more than the U-Net alone": [
            (one._replace(text_method="", text_sparsity=0.0), one) for one in joint
        ],
    }
    note = (
        "Each pair is two models drawn from the same prompts and noise; a pair decides when the 95 % interval of the "
        "difference of their CLIP scores leaves 0 out. With so many pairs one in twenty decides by chance."
    )
    found = tables.comparisons(study, claims)
    has_run = list(found["pairs"] != "0")
    return Table("findings", "What of the study holds here", found, note, has_run, any(has_run))


def report_figures(study: Study) -> list[Figure]:
    """Draw those of Figures 1 to 14 for which there are runs."""
    text, image = (_named(study.alone(kind)) for kind in ("text", "image"))

    def strips(caption: str, lines: Mapping[str, pd.DataFrame], column: str) -> list[Figure | None]:
        return [figures.strip(study, caption + name, runs, column) for name, runs in lines.items()]

    made: list[Figure | None] = []
    for figure, method in ((1, "magnitude"), (3, "wanda"), (5, "owl_magnitude"), (7, "owl_wanda")):
        lines = {name: runs for name, runs in text.items() if runs["text_method"].iloc[0] == method}
        title = f"Figure {figure}. Only the text encoder pruned, {_words(method)}"
        made.append(figures.curves(study, title, lines, "text_sparsity"))
        made += strips(f"Figure {figure + 1}. Only the text encoder pruned, ", lines, "text_sparsity")
    made.append(figures.curves(study, "Figure 9. Only the text encoder pruned, every method", text, "text_sparsity"))
    title = "Every method on the text encoder, one prompt, the same noise"
    made.append(figures.methods(study, title, text, "text_sparsity"))
    made.append(figures.curves(study, "Figure 10. Only the U-Net pruned", image, "image_sparsity"))
    made += strips("Figure 11. Only the U-Net pruned, ", image, "image_sparsity")
    if len(image) > 1:
        title = "Every method on the U-Net, one prompt, the same noise"
        made.append(figures.methods(study, title, image, "image_sparsity"))
    joint = {f"text encoder by {_words(method)}": _steps(study, method) for method in ("magnitude", "owl_magnitude")}
    title = "Figure 12. Both components pruned, down from the drop-off points"
    made.append(figures.curves(study, title, joint, "nominal", "nominal"))
    made.append(figures.strip(study, "Figure 13. Both components pruned", _steps(study, "magnitude"), "nominal"))
    lines = {name: runs for name, runs in image.items() if runs["image_method"].iloc[0] == "magnitude"}
    lines = {name.removeprefix("magnitude"): runs for name, runs in lines.items()}
    made += strips("Figure 14. Pruning the U-Net: quality falls gradually", lines, "image_sparsity")
    return figures.distinct([*(one for one in made if one is not None), *sensitivity.strips(study)])


def _steps(study: Study, method: str) -> pd.DataFrame:
    found = [study.find(Cell.of(method, *pair)) for pair in STEPS]
    return study.runs.loc[[run.name for run in found if run is not None]]


def _named(lines: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Lines by their names in captions: criterion by criterion, and of each the plain one first."""
    return dict(sorted(((_words(name), runs) for name, runs in lines.items()), key=lambda line: line[0].casefold()))


def _words(name: str) -> str:
    """Write a method and its choices as captions have them: `owl_wanda by layer` as `Wanda by layer with OWL`."""
    method, comma, choices = name.partition(", ")
    *narrowed, method = method.rsplit(f"{NARROWED} ", 1)
    criterion, by, granularity = method.partition(" by ")
    allocation, _, criterion = criterion.rpartition("_")
    words = _NAMES.get(criterion, criterion) + by + granularity
    words += f" with {_NAMES.get(allocation, allocation)}" if allocation else ""
    return (f"{NARROWED} " if narrowed else "") + words + comma + choices
