"""Pictures and numbers as HTML; whatever a visitor typed is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from sdprune.playground.core import Shown
from sdprune.pruning import scopes

_SHORT = ("clip", "mse", "ssim", "lpips", "pickscore")
_SMALL = 128  # pixels: below, a picture is enlarged without smoothing


def head(title: str, models: Sequence[object], facts: str) -> str:
    """The title, the models that draw, and how they draw."""
    names = ", beside ".join(f"<code>{escape(str(name))}</code>" for name in models)
    return f"<h1>{escape(title)}</h1><p>{names}: {escape(facts)}</p>"


def bad(text: str) -> str:
    """What is wrong, in one line."""
    return f'<p class="bad" role="alert">{escape(" ".join(text.split()))}</p>'


def notes(lines: Sequence[str]) -> str:
    """What a reader should know."""
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def pair(shown: Shown) -> str:
    """The two pictures beside each other."""
    sparsities = ", ".join(f"{name} {choice.sparsity:.0%}" for name, choice in shown.view.choices.items())
    return _cards(
        [
            (f"dense: {shown.view.prompt}", "dense", shown.dense),
            (f"pruned: {shown.view.prompt}", f"pruned: {sparsities}", shown.pruned),
        ],
        " two",
    )


def strip(prompt: str, component: str, pictures: Sequence[tuple[float, np.ndarray]]) -> str:
    """The pictures at several sparsities of a component."""
    labels = [f"{component} {sparsity:.0%}" for sparsity, _ in pictures]
    return _cards([(f"{label}: {prompt}", label, pixels) for label, (_, pixels) in zip(labels, pictures, strict=True)])


def scores(shown: Shown) -> str:
    """What is said of the two pictures."""
    rows = [
        f"<tr><td>{escape(_words(name))}</td>{''.join(f'<td>{_value(one)}</td>' for one in both)}</tr>"
        for name, both in shown.scores.items()
    ]
    head = "<tr><td></td><th>dense</th><th>pruned</th></tr>"
    return f'<table class="facts"><caption>Scores</caption>{head}{"".join(rows)}</table>' if rows else ""


def zeros(sparsity: Mapping[str, Any]) -> str:
    """The weights that are really zero."""
    shares = {"nominal (the study's count)": ("", f"{sparsity['nominal']:.2%}")} | {
        name: (f"{whole['zeros']:,} of {whole['parameters']:,}", f"{whole['zero_fraction']:.2%}")
        for name, whole in scopes(sparsity).items()
        if whole["parameters"]
    }
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{count}</td><td>{share}</td></tr>" for name, (count, share) in shares.items()
    )
    return f'<table class="facts"><caption>Zeros</caption>{rows}</table>'


def _cards(pictures: Sequence[tuple[str, str, np.ndarray]], kind: str = "") -> str:
    small = " small-pictures" if max(pictures[0][2].shape) <= _SMALL else ""
    figures = "".join(
        f'<figure><img src="{_data(pixels)}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(label)}</figcaption></figure>"
        for alt, label, pixels in pictures
    )
    return f'<div class="cards{kind}{small}">{figures}</div>'


def _data(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _words(name: str) -> str:
    """The name of a score for people: `dense_ssim` is the SSIM to the dense picture."""
    words = [word.upper() if word in _SHORT else word for word in name.removeprefix("dense_").split("_")]
    return " ".join(words) + (" to dense" if name.startswith("dense_") else "")


def _value(value: float | bool | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return '<span class="yes">yes</span>' if value else '<span class="no">no</span>'
    return f"{value:.4g}"
