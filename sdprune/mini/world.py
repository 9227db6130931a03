"""The embedded world: captioned 64 x 64 scenes, deterministic from a seed, in COCO's own layout.

A scene holds one or two objects (size, colour, shape) on a background; two objects stand in a relation. Whether a
(colour, shape, background) triple is held out follows from its indices, so the evaluation split shows only triples
that training never saw, while every pair of attributes was seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 225, 50),
    "green": (35, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (35, 75, 215),
    "purple": (125, 50, 175),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "moon")
SIZES = {"small": 8.0, "medium": 11.5, "large": 15.0}  # radius in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
BACKGROUNDS = {"sand": (228, 208, 160), "white": (245, 245, 245), "grey": (128, 130, 134), "black": (22, 22, 26)}

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object; x and y are its centre in pixels."""

    size: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def phrase(self) -> str:
        """`a small red star`; medium goes unsaid."""
        words = [self.colour, self.shape] if self.size == "medium" else [self.size, self.colour, self.shape]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """One or two things; the first stands `relation` the second."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None

    @property
    def captions(self) -> list[str]:
        """The full caption first, then a rewording of it, then one without the background."""
        body = f" {self.relation} ".join(thing.phrase for thing in self.things)
        return [f"{body} on a {self.background} background", f"a {self.background} background with {body}", body]

    def render(self) -> np.ndarray:
        """The picture, uint8 [64, 64, 3], antialiased."""
        side = SIDE * _SUPERSAMPLING
        image = Image.new("RGB", (side, side), BACKGROUNDS[self.background])
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            _draw(draw, thing, BACKGROUNDS[self.background])
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def held_out(colour: str, shape: str, background: str) -> bool:
    """Whether training never sees this triple: a quarter of them, one background for each colour and shape."""
    indices = (list(COLOURS).index(colour), SHAPES.index(shape), list(BACKGROUNDS).index(background))
    return sum(indices) % len(BACKGROUNDS) == 0


def scenes(split: str, n: int, seed: int = 0) -> Iterator[Scene]:
    """The first n scenes of a split: `train` has no held-out triple, every other split nothing else."""
    rng = np.random.default_rng([seed, *split.encode()])
    for _ in range(n):
        yield _scene(rng, unseen=split != "train")


def write_coco(root: Path, split: str, n: int, seed: int = 0) -> None:
    """Write n scenes as `annotations/captions_<split>.json` and `<split>/<id>.jpg`, annotations last."""
    pictures, annotations = [], []
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for index, scene in enumerate(scenes(split, n, seed), start=1):
        name = f"{index:012d}.jpg"
        Image.fromarray(scene.render()).save(root / split / name, quality=95, subsampling=0)
        pictures.append({"id": index, "file_name": name, "width": SIDE, "height": SIDE})
        annotations += [{"image_id": index, "caption": caption} for caption in scene.captions]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    document = {"info": {"description": "sdprune embedded world"}, "images": pictures, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(document))


def _scene(rng: np.random.Generator, unseen: bool) -> Scene:
    background = _pick(rng, list(BACKGROUNDS))
    if rng.random() < 0.4:
        x, y = (SIDE / 2 + rng.uniform(-8, 8, size=2)).tolist()
        return Scene((_thing(rng, background, unseen, x, y),), background)
    relation = _pick(rng, list(RELATIONS))
    dx, dy = RELATIONS[relation]
    things = []
    for sign in (1, -1):
        x = SIDE / 2 + sign * dx * 16 + rng.uniform(-1, 1) + (dx == 0) * rng.uniform(-6, 6)
        y = SIDE / 2 + sign * dy * 16 + rng.uniform(-1, 1) + (dy == 0) * rng.uniform(-6, 6)
        things.append(_thing(rng, background, unseen, x, y))
    return Scene(tuple(things), background, relation)


def _thing(rng: np.random.Generator, background: str, unseen: bool, x: float, y: float) -> Thing:
    while True:
        colour, shape = _pick(rng, list(COLOURS)), _pick(rng, SHAPES)
        if held_out(colour, shape, background) == unseen:
            return Thing(_pick(rng, list(SIZES)), colour, shape, x, y)


def _pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, background: tuple[int, int, int]) -> None:
    x, y, r = (value * _SUPERSAMPLING for value in (thing.x, thing.y, SIZES[thing.size]))
    colour = COLOURS[thing.colour]
    if thing.shape in ("circle", "ring", "moon"):
        _disc(draw, x, y, r, colour)
        if thing.shape == "ring":
            _disc(draw, x, y, 0.5 * r, background)
        elif thing.shape == "moon":
            _disc(draw, x + 0.6 * r, y - 0.3 * r, 0.85 * r, background)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in _OUTLINES[thing.shape]], fill=colour)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _radial(radii: list[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(start + i * step), r * math.sin(start + i * step)) for i, r in enumerate(radii)]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _radial([1.1, 0.45] * 5),
    "diamond": [(0.0, -1.1), (0.75, 0.0), (0.0, 1.1), (-0.75, 0.0)],
    "cross": [
        *((-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33)),
        *((0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33)),
    ],
}
