"""Figures of runs, whichever study they belong to: curves with intervals, and sheets of sample pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from sdprune.pictures import grid
from sdprune.study.group import DENSE, KEYS, Study, number
from sdprune.study.records import sample

SCORES = {"fid": "FID (lower is better)", "clip_score": "CLIP score (higher is better)"}
# Colours that people with colour blindness tell apart (Okabe & Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
"""Of the lines of each round through the colours."""
_SIDE = 128  # pixels of a picture in a sheet


class Figure(NamedTuple):
    """A picture: the name of its file, the caption, and the bytes of an SVG or PNG file."""

    name: str
    caption: str
    content: bytes


def distinct(made: Sequence[Figure]) -> list[Figure]:
    """Give figures different file names; captions that begin alike would give one name."""
    seen: dict[str, int] = {}
    found = []
    for figure in made:
        seen[figure.name] = count = seen.get(figure.name, 0) + 1
        stem, _, suffix = figure.name.rpartition(".")
        found.append(figure if count == 1 else figure._replace(name=f"{stem}_{count}.{suffix}"))
    return found


def _slug(caption: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in caption.lower()).strip("_").replace("__", "_")[:80]


def curves(
    study: Study, caption: str, lines: Mapping[str, pd.DataFrame], column: str, axis: str = "sparsity of the component"
) -> Figure | None:
    """Draw FID and CLIP score against sparsity: a line with its 95 % band a method, and the dense model's level.

    `lines` are runs by the name of their line, `column` holds their sparsity, `axis` is its name.
    """
    if not any(map(len, lines.values())):
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdprune", "font.size": 9, "text.parse_math": False}):
        canvas = Canvas(figsize=(9, 3.4), layout="constrained")
        for axes, (metric, label) in zip(canvas.subplots(1, 2), SCORES.items(), strict=True):
            for i, (name, runs) in enumerate(lines.items()):
                around, place = divmod(i, len(COLOURS))
                style = {"color": COLOURS[place], "linestyle": DASHES[around % len(DASHES)]}
                _line(axes, runs, column, metric, style, name)
            level = number(study.dense, f"metrics/{metric}")
            if level is not None:
                axes.axhline(level, color="grey", linestyle="--", linewidth=1, label="dense")
            axes.set(xlabel=f"{axis}, %", ylabel=label)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        content = io.BytesIO()
        canvas.savefig(content, format="svg", metadata={"Date": None})
    return Figure(f"{_slug(caption)}.svg", caption, content.getvalue())


def _line(axes: Any, runs: pd.DataFrame, column: str, metric: str, style: dict[str, str], name: str) -> None:
    score, change = f"metrics/{metric}", f"comparison/{metric}_diff"
    columns = [column, score, change, f"{change}_low", f"{change}_high"]
    found = runs.sort_values(column, kind="stable").reindex(columns=columns).astype(float).dropna(subset=[score])
    if not len(found):
        return
    sparsities = 100 * found[column]
    axes.plot(sparsities, found[score], marker="o", markersize=3, label=_short(name), **style)
    if found.notna().all(axis=None):
        low, high = (found[score] - found[change] + found[f"{change}_{end}"] for end in ("low", "high"))
        axes.fill_between(sparsities, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _short(name: str) -> str:
    """Wrap a name for the legend, to at most four lines."""
    lines = wrap(name, 44)
    return "\n".join([*lines[:3], "..."] if len(lines) > 4 else lines)


def strip(study: Study, caption: str, runs: pd.DataFrame, column: str) -> Figure | None:
    """Show prompts down and sparsity across, the dense model first."""
    pruned = (runs[KEYS] != list(DENSE)).any(axis=1)
    heads, shown = ([], []) if study.dense is None else (["dense"], [study.dense])
    for _, run in runs[pruned].sort_values(column, kind="stable").iterrows():
        pair = f"{100 * run['text_sparsity']:g} / {100 * run['image_sparsity']:g} %"
        heads.append(pair if column == "nominal" else f"{100 * run[column]:g} %")
        shown.append(run)
    prompts = dict.fromkeys(prompt for run in shown for prompt in run["samples"])
    if len(shown) < 2 or not prompts:
        return None
    return _sheet(caption, {prompt: [_sample(study, run, prompt) for run in shown] for prompt in prompts}, heads)


def methods(study: Study, caption: str, lines: Mapping[str, pd.DataFrame], column: str) -> Figure | None:
    """Show methods down and sparsity across, for one prompt; a missing run is white."""
    runs = [run for line in lines.values() for _, run in line.iterrows()]
    sparsities = sorted({run[column] for run in runs})
    prompts = [prompt for run in runs for prompt in run["samples"]]
    if not prompts:
        return None
    rows = {}
    for name, line in lines.items():
        by = {run[column]: run for _, run in line.iterrows()}
        rows[name] = [_sample(study, run, prompts[0]) for run in (study.dense, *map(by.get, sparsities))]
    return _sheet(f"{caption}: {prompts[0]}", rows, ["dense", *(f"{100 * sparsity:g} %" for sparsity in sparsities)])


def damaged_sample(run: str, place: int) -> str:
    """Say that a run's sample picture is not shown."""
    return f"{run}: samples/{place}.png is missing or damaged, its place stays empty"


def _sample(study: Study, run: pd.Series | None, prompt: str) -> np.ndarray:
    """Return a run's picture of a prompt, white where it has none."""
    if run is not None and prompt in run["samples"]:
        place = run["samples"].index(prompt)
        found = sample(run, place, _SIDE)
        if found is not None:
            return found
        study.notes.append(damaged_sample(run["run"], place))
    return np.full((_SIDE, _SIDE, 3), 255, dtype=np.uint8)


def _sheet(caption: str, rows: Mapping[str, Sequence[np.ndarray]], heads: Sequence[str]) -> Figure:
    content = io.BytesIO()
    Image.fromarray(grid(rows, heads, smallest=_SIDE)).save(content, format="PNG")
    return Figure(f"{_slug(caption)}.png", caption, content.getvalue())
