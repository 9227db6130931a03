"""The study's figures, from records: curves with intervals, and strips of pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image

from sdprune.errors import InputError
from sdprune.pictures import grid
from sdprune.runs.png import read_png
from sdprune.study.group import Line, Study
from sdprune.study.records import DENSE, Pruned, Run
from sdprune.study.tables import STEPS

SCORES = {"fid": "FID (lower is better)", "clip_score": "CLIP score (higher is better)"}
# Colours that people with colour blindness tell apart (Okabe & Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SIDE = 128  # pixels of a picture in a strip


@dataclass
class Figure:
    """A picture with its caption.

    Args:
        name: file name, with its suffix.
        caption: one line.
        content: of the file: svg or png.
    """

    name: str
    caption: str
    content: bytes


def figures(study: Study) -> list[Figure]:
    """Those of the study for which there are runs."""
    text, image = study.alone(text=True), study.alone(text=False)
    made: list[Figure | None] = []
    numbers = {"magnitude": (1, 2), "wanda": (3, 4), "owl_magnitude": (5, 6), "owl_wanda": (7, 8)}
    for method, (curve, strip) in numbers.items():
        lines = [line for line in text if line.method == method]
        made.append(
            _curves(study, f"Figure {curve}. Only the text encoder pruned, {_words(method)}", _points(lines, True))
        )
        for line in lines:
            made.append(_strip(study, f"Figure {strip}. Only the text encoder pruned, {_named(line)}", line.runs, True))
    made.append(_curves(study, "Figure 9. Only the text encoder pruned, every method", _points(text, True)))
    made.append(_methods(study, "Every method on the text encoder, one prompt, the same noise", text, True))
    made.append(_curves(study, "Figure 10. Only the U-Net pruned", _points(image, False)))
    for line in image:
        made.append(_strip(study, f"Figure 11. Only the U-Net pruned, {_named(line)}", line.runs, False))
    if len(image) > 1:
        made.append(_methods(study, "Every method on the U-Net, one prompt, the same noise", image, False))
    joint = {
        f"text encoder by {_words(method)}": [
            run for t, u in STEPS if (run := study.find(Pruned(method, t), Pruned("magnitude", u))) is not None
        ]
        for method in ("magnitude", "owl_magnitude")
    }
    points = {name: [(run.nominal, run) for run in runs] for name, runs in joint.items()}
    made.append(_curves(study, "Figure 12. Both components pruned, down from the drop-off points", points, "nominal"))
    made.append(_strip(study, "Figure 13. Both components pruned", joint["text encoder by magnitude"], None))
    for line in image:
        if line.method == "magnitude":
            caption = "Figure 14. Pruning the U-Net: quality falls gradually"
            suffix = line.name.removeprefix(line.method)
            made.append(_strip(study, caption + suffix, line.runs, False))
    return _distinct([figure for figure in made if figure is not None])


def _distinct(made: list[Figure]) -> list[Figure]:
    """Captions that begin alike would give one file name."""
    seen: dict[str, int] = {}
    for figure in made:
        seen[figure.name] = seen.get(figure.name, 0) + 1
        if seen[figure.name] > 1:
            stem, _, suffix = figure.name.rpartition(".")
            figure.name = f"{stem}_{seen[figure.name]}.{suffix}"
    return made


def _named(line: Line) -> str:
    return _words(line.method) + line.name.removeprefix(line.method)


def _words(method: str) -> str:
    return {"owl_magnitude": "magnitude with OWL", "owl_wanda": "Wanda with OWL", "wanda": "Wanda"}.get(method, method)


def _slug(caption: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in caption.lower()).strip("_").replace("__", "_")[:80]


def _amount(run: Run, text: bool | None) -> float:
    return run.nominal if text is None else run.component(text).pruned.sparsity


def _points(lines: Sequence[Line], text: bool) -> dict[str, list[tuple[float, Run]]]:
    return {_named(line): [(_amount(run, text), run) for run in line.runs] for line in lines}


def _curves(
    study: Study,
    caption: str,
    lines: Mapping[str, Sequence[tuple[float, Run]]],
    axis: str = "sparsity of the component",
) -> Figure | None:
    """FID and CLIP score against sparsity: a line a method with its 95 % band, and the dense model's level."""
    if not any(lines.values()):
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdprune", "font.size": 9, "text.parse_math": False}):
        canvas = Canvas(figsize=(9, 3.4), layout="constrained")
        for axes, (metric, label) in zip(canvas.subplots(1, 2), SCORES.items(), strict=True):
            for colour, (name, points) in zip(COLOURS * 3, lines.items(), strict=False):
                _line(axes, sorted(points, key=lambda point: point[0]), metric, colour, name)
            level = study.dense.metrics.get(metric) if study.dense else None
            if level is not None:
                axes.axhline(level, color="grey", linestyle="--", linewidth=1, label="dense")
            axes.set(xlabel=f"{axis}, %", ylabel=label)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        content = io.BytesIO()
        canvas.savefig(content, format="svg", metadata={"Date": None})
    return Figure(f"{_slug(caption)}.svg", caption, content.getvalue())


def _line(axes: Any, points: Sequence[tuple[float, Run]], metric: str, colour: str, name: str) -> None:
    measured = [(100 * amount, run.metrics.get(metric), run.difference(metric)) for amount, run in points]
    found = [(amount, score, change) for amount, score, change in measured if score is not None]
    if not found:
        return
    amounts, scores = [point[0] for point in found], [point[1] for point in found]
    axes.plot(amounts, scores, marker="o", markersize=3, color=colour, label=_short(name))
    ends = [
        (score - change.value + change.low, score - change.value + change.high)
        for _, score, change in found
        if change is not None and change.low is not None and change.high is not None
    ]
    if len(ends) == len(found):
        axes.fill_between(amounts, *zip(*ends, strict=True), color=colour, alpha=0.15, linewidth=0)


def _short(name: str) -> str:
    """For a legend: at most four lines."""
    lines = wrap(name, 44)
    return "\n".join([*lines[:3], "..."] if len(lines) > 4 else lines)


def _strip(study: Study, caption: str, runs: Sequence[Run], text: bool | None) -> Figure | None:
    """Prompts down, sparsity across, the dense model first."""
    columns = _columns(study, runs, text)
    prompts = list(dict.fromkeys(prompt for _, run in columns for prompt in run.samples))
    if len(columns) < 2 or not prompts:
        return None
    rows = {prompt: [_sample(study, run, prompt) for _, run in columns] for prompt in prompts}
    return _sheet(caption, rows, [name for name, _ in columns])


def _methods(study: Study, caption: str, lines: Sequence[Line], text: bool) -> Figure | None:
    """Methods down, sparsity across, one prompt; a run that is not there is white."""
    amounts = sorted({_amount(run, text) for line in lines for run in line.runs})
    prompts = [prompt for line in lines for run in line.runs for prompt in run.samples]
    if not prompts:
        return None
    rows = {}
    for line in lines:
        by = {_amount(run, text): run for run in line.runs}
        pictures = [_sample(study, run, prompts[0]) for run in (study.dense, *map(by.get, amounts))]
        rows[_named(line)] = pictures
    heads = ["dense", *(f"{100 * amount:g} %" for amount in amounts)]
    return _sheet(f"{caption}: {prompts[0]}", rows, heads)


def _columns(study: Study, runs: Sequence[Run], text: bool | None) -> list[tuple[str, Run]]:
    columns = [] if study.dense is None else [("dense", study.dense)]
    for run in sorted(runs, key=lambda run: _amount(run, text)):
        if run.key != (DENSE, DENSE):
            pair = f"{100 * run.text.pruned.sparsity:g} / {100 * run.image.pruned.sparsity:g} %"
            columns.append((pair if text is None else f"{100 * _amount(run, text):g} %", run))
    return columns


def _sample(study: Study, run: Run | None, prompt: str) -> np.ndarray:
    """A run's picture of a prompt; white where it has none."""
    if run is not None and prompt in run.samples:
        path = run.directory / "samples" / f"{run.samples.index(prompt)}.png"
        try:
            pixels = read_png(path).pixels
            how = Image.Resampling.NEAREST if min(pixels.shape[:2]) < _SIDE else Image.Resampling.LANCZOS
            return np.asarray(Image.fromarray(pixels).resize((_SIDE, _SIDE), how))
        except (InputError, ValueError, Image.DecompressionBombError):
            study.note(f"{run.name}: samples/{path.name} is missing or damaged, it is shown white")
    return np.full((_SIDE, _SIDE, 3), 255, dtype=np.uint8)


def _sheet(caption: str, rows: Mapping[str, Sequence[np.ndarray]], heads: Sequence[str]) -> Figure:
    content = io.BytesIO()
    Image.fromarray(grid(rows, heads, smallest=_SIDE)).save(content, format="PNG")
    return Figure(f"{_slug(caption)}.png", caption, content.getvalue())
