"""What a single-object picture shows, by geometry and colour alone: an oracle that was never trained."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from sdprune.mini.captions import BACKGROUNDS, COLOURS, SHAPES, SIZES, Content, Kind
from sdprune.mini.world import SIDE, Scene, Thing

_PLACEHOLDER = ("blue", "white")  # colour and background of the templates; only coverage is taken from them


class Attributes(NamedTuple):
    """Colour, shape, size and background of the best explanation of a picture."""

    colour: str
    shape: str
    size: str
    background: str


def classify(picture: np.ndarray) -> Attributes:
    """The attributes of a single-object picture, uint8 [64, 64, 3].

    The background is the nearest to the border's median colour. For each colour the coverage that would explain the
    pixels is compared with each shape's template of each size at the coverage's centre of mass; the smallest squared
    error wins.
    """
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    background = _nearest(np.median(border, axis=0), BACKGROUNDS)
    ground = np.array(BACKGROUNDS[background], dtype=np.float64)
    best: tuple[float, Attributes] | None = None
    for colour, value in COLOURS.items():
        direction = np.array(value) - ground
        coverage = np.clip((pixels - ground) @ direction / (direction @ direction), 0, 1)
        if coverage.sum() < 20:
            continue
        centre = _centre(np.where(coverage > 0.3, coverage, 0))
        for shape in SHAPES:
            for size in SIZES:
                template = _template(shape, size, *(round(4 * c) for c in centre))
                error = float(((ground + template[..., None] * direction - pixels) ** 2).sum())
                if best is None or error < best[0]:
                    best = error, Attributes(colour, shape, size, background)
    return best[1] if best else Attributes("none", "none", "none", background)


def _nearest(value: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(((np.array(names[name]) - value) ** 2).sum()))


def _centre(coverage: np.ndarray) -> tuple[float, float]:
    total = max(coverage.sum(), 1e-9)
    places = np.arange(SIDE)
    return float((coverage.sum(0) * places).sum() / total), float((coverage.sum(1) * places).sum() / total)


@cache
def _template(shape: str, size: str, quarter_x: int, quarter_y: int) -> np.ndarray:
    """Coverage [64, 64] of a shape whose centre of mass lies at the given quarters of a pixel."""
    middle = _coverage(shape, size, SIDE / 2, SIDE / 2)
    x, y = _centre(middle)
    return _coverage(shape, size, SIDE / 2 + quarter_x / 4 - x, SIDE / 2 + quarter_y / 4 - y)


@cache
def _coverage(shape: str, size: str, x: float, y: float) -> np.ndarray:
    colour, background = _PLACEHOLDER
    kind = Kind(size, colour, shape)
    picture = Scene(Content((kind,), background), (Thing(kind, x, y),)).render().astype(np.float64)
    ground, value = np.array(BACKGROUNDS[background]), np.array(COLOURS[colour])
    direction = value - ground
    return np.clip((picture - ground) @ direction / (direction @ direction), 0, 1)
