"""Where the meaning sits: what pruning each layer or block alone changed, ranked and over depth."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from sdprune.identity import fingerprint
from sdprune.study.figures import COLOURS, Figure
from sdprune.study.group import Study
from sdprune.study.tables import Table, percent

_SHOWN = 15
"""Rows of a table; the others are one row together."""
Measured = Mapping[str, Any]
"""What a record says of one component: its criterion, levels, and units in the order in which they run."""


def tables(study: Study) -> list[Table]:
    """Rank the units of every component that was measured, the most sensitive first."""
    seen: dict[str, Table] = {}
    for parts in _measurements(study):
        for name, one in parts.items():
            seen.setdefault(_key(one), _table(f"sensitivity_{len(seen) + 1}", name, one))
    return list(seen.values())


def strips(study: Study) -> list[Figure]:
    """Draw the errors of every measurement over depth, the components below each other."""
    return [_strip(f"sensitivity_{number}.svg", parts) for number, parts in enumerate(_measurements(study), 1)]


def _measurements(study: Study) -> Iterator[Mapping[str, Measured]]:
    """Each set of components that was measured in one run, once."""
    seen = set()
    for parts in study.runs.get("sensitivity", pd.Series(dtype=object)).dropna():
        key = fingerprint({name: _key(one) for name, one in parts.items()})
        if parts and key not in seen:
            seen.add(key)
            yield parts


def _key(one: Measured) -> str:
    """Equal for the same measurement, whatever was pruned after it."""
    units = [[unit["name"], unit["weights"], [repr(error) for error in unit["errors"]]] for unit in one["units"]]
    return fingerprint({"criterion": one["criterion"], "levels": one["levels"], "units": units})


def _errors(one: Measured) -> np.ndarray:
    """The errors [units, levels]; what is not finite counts as the largest finite one."""
    errors = np.array([unit["errors"] for unit in one["units"]], dtype=float)
    finite = errors[np.isfinite(errors)]
    return np.nan_to_num(errors, nan=finite.max(initial=0), posinf=finite.max(initial=0))


def _shares(one: Measured) -> np.ndarray:
    """Each unit's share of the sum of errors at the middle level."""
    errors = _errors(one)[:, len(one["levels"]) // 2]
    return errors / (errors.sum() or 1)


def _title(name: str, one: Measured) -> str:
    place = "the denoiser's prediction" if one["read_at"] == "prediction" else "its own output"
    return f"{name} by {one['criterion'].lower()}, each {one['unit']} alone, error of {place}"


def _table(file: str, name: str, one: Measured) -> Table:
    middle, shares = one["levels"][len(one["levels"]) // 2], _shares(one)
    weights = np.array([unit["weights"] for unit in one["units"]]) / sum(unit["weights"] for unit in one["units"])
    ranked = np.argsort(-shares, kind="stable")
    rows = [
        [
            str(rank), one["units"][i]["name"], percent(weights[i]), percent(shares[i]),
            *(f"{error:.2e}" for error in one["units"][i]["errors"]),
        ]
        for rank, i in enumerate(ranked[:_SHOWN], 1)
    ]  # fmt: skip
    if len(rest := ranked[_SHOWN:]):
        levels = [""] * len(one["levels"])
        rows.append(["", f"the other {len(rest)}", percent(weights[rest].sum()), percent(shares[rest].sum()), *levels])
    heads = [f"at {100 * level:g} %" for level in one["levels"]]
    columns = ["rank", one["unit"], "of the weights", f"of the error at {100 * middle:g} %", *heads]
    note = (
        "Relative squared error when it is pruned alone. results.json has all of them, in the order in which they run."
    )
    return Table(file, f"Sensitivity. {_title(name, one)}", pd.DataFrame(rows, columns=columns), note)


def _strip(file: str, parts: Mapping[str, Measured]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Canvas

    errors = {name: _errors(one) for name, one in parts.items()}
    low = min(one.min(where=one > 0, initial=1) for one in errors.values())  # what changes nothing is as light as that
    norm = LogNorm(low, max(2 * low, *(one.max() for one in errors.values())))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdprune", "font.size": 9, "text.parse_math": False}):
        canvas = Canvas(figsize=(10, 3.1 * len(parts)), layout="constrained")
        axes = canvas.subplots(2 * len(parts), 1, height_ratios=[1, 1.3] * len(parts), squeeze=False)[:, 0]
        for (name, one), bars, strip in zip(parts.items(), axes[::2], axes[1::2], strict=True):
            middle = one["levels"][len(one["levels"]) // 2]
            count = len(one["units"])
            bars.bar(range(count), 100 * _shares(one), width=1, color=COLOURS[1])
            bars.set(xlim=(-0.5, count - 0.5), xticks=[], ylabel=f"% of error\nat {100 * middle:g} %")
            bars.set_title(_title(name, one), loc="left", fontsize=9)
            bars.spines[["top", "right"]].set_visible(False)
            image = strip.imshow(
                np.maximum(errors[name], low).T, aspect="auto", origin="lower", cmap="magma_r", norm=norm
            )
            strip.set(ylabel="pruned alone to", yticks=range(len(one["levels"])))
            strip.set_yticklabels([f"{100 * level:g} %" for level in one["levels"]])
            _name_blocks(strip, one["units"])
        canvas.colorbar(image, ax=list(axes), label="relative squared error", shrink=0.8, format=_power)
        content = io.BytesIO()
        canvas.savefig(content, format="svg", metadata={"Date": None})
    names = " and ".join(parts)
    caption = (
        f"Where the meaning sits: {names}, one {next(iter(parts.values()))['unit']} pruned alone, in order of depth"
    )
    return Figure(file, caption, content.getvalue())


def _power(value: float, _: Any) -> str:
    return f"{value:.0e}"


def _name_blocks(axes: Any, units: Sequence[Mapping[str, Any]]) -> None:
    """Name each run of units of one block below it, and draw a line between blocks."""
    start, places, names = 0, [], []
    for block, run in groupby(units, key=lambda unit: unit["block"]):
        length = len(list(run))
        places.append(start + (length - 1) / 2)
        names.append(".".join(str(block).split(".")[-2:]))
        start += length
        if start < len(units) and len(units) > len({unit["block"] for unit in units}):
            axes.axvline(start - 0.5, color="white", linewidth=1)
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
