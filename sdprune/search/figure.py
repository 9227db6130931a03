"""The picture of a search."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdprune.search.search import CERTIFICATE, VERDICTS, Probe, Search

_COLOURS = {"certified": "#009E73", "futile": "#D55E00", "undecided": "#E69F00", "": "grey"}
# Colours that people with colour blindness tell apart (Okabe & Ito, 2008).


def draw(search: Search, scored: str, facts: Mapping[str, Any]) -> bytes:
    """Draw loss against sparsity, a panel a path, with plain intervals and numbers of images; and all tests in order.

    Args:
        search: that is over.
        scored: name of the score.
        facts: what pruning came to, by the name of the model.

    Returns:
        An SVG file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = {name: [one for one in search.probes if one.path == name] for name in search.paths}
    if others := [one for one in search.probes if one.path not in search.paths]:
        panels["together" if len(search.paths) > 1 else "certificate"] = others
    factor, unit = (100, ", %") if search.tolerance.relative else (1, "")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdprune", "font.size": 9, "text.parse_math": False}):
        canvas = Figure(figsize=(3.6 * (len(panels) + 1), 3.4), layout="constrained")
        *axes, last = canvas.subplots(1, len(panels) + 1)
        for ax, (name, probes) in zip(axes, panels.items(), strict=True):
            axis = _losses(ax, probes, factor, facts)
            if name in search.paths:
                _fit(ax, search.shape(name), factor)
            ax.axhline(factor * search.tolerance.value, color="black", linestyle="--", linewidth=1)
            ax.set(title=name, xlabel=f"{axis}, %", ylabel=f"loss in {scored}{unit}")
        _images(last, search)
        for ax in (*axes, last):
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        canvas.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _losses(ax: Any, probes: Sequence[Probe], factor: float, facts: Mapping[str, Any]) -> str:
    """Draw the tests; what the x axis counts."""
    alone = all(len(one.model.sparsities) == 1 for one in probes)
    for one in probes:
        if math.isnan(one.loss):
            continue
        pruned = one.model.sparsities.values() if alone else [_zeros(one, facts)]
        x, y = 100 * next(iter(pruned)), factor * one.loss
        half = [[factor * (one.loss - one.low)], [factor * (one.high - one.loss)]]
        marker = "s" if one.part == CERTIFICATE else "o"
        ax.errorbar(x, y, yerr=half, fmt=marker, markersize=4, linewidth=1, color=_COLOURS[one.verdict])
        ax.annotate(str(one.n), (x, y), (4, 4), textcoords="offset points", fontsize=7)
    return "sparsity" if alone else "zeros of the prunable components"


def _zeros(probe: Probe, facts: Mapping[str, Any]) -> float:
    return float(facts[probe.model.name]["sparsity"]["prunable"]["zero_fraction"])


def _fit(ax: Any, shape: Mapping[str, Any] | None, factor: float) -> None:
    if shape is None:
        return
    low, high = np.clip(ax.get_xlim(), 0.1, 99.9)
    s = np.linspace(float(low), float(high), 200) / 100
    loss = factor * shape["a"] * (s / (1 - s)) ** shape["b"]
    shown = loss <= ax.get_ylim()[1]
    ax.plot(100 * s[shown], loss[shown], color="grey", linewidth=1, linestyle=":")


def _images(ax: Any, search: Search) -> None:
    heights, colours = zip(*((one.n, _COLOURS[one.verdict]) for one in search.probes), strict=True)
    ax.bar(range(1, len(heights) + 1), heights, color=colours)
    ax.axhline(search.n_max, color="black", linestyle="--", linewidth=1)
    ax.set(title="images", xlabel="test, in order", ylim=(0, 1.5 * search.n_max))
    ax.xaxis.get_major_locator().set_params(integer=True)
    handles = [ax.bar(1, 0, color=_COLOURS[name], label=label) for name, label in VERDICTS.items()]
    handles += ax.plot([], [], "ks", markersize=4, label="fresh prompts")
    ax.legend(handles=handles, frameon=False, fontsize=7, ncols=2, loc="upper left")
