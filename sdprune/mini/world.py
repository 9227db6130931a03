"""The embedded world: captioned 64 x 64 scenes, deterministic from a seed, in COCO's own layout.

A scene holds one object (size, colour, shape), two that stand in a relation, or several of a kind, on a background.
Whether a (colour, shape, background) triple is held out follows from its indices, so the evaluation split shows only
triples that training never saw, while every pair of attributes was seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdprune.mini.captions import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Content, Kind

SIDE = 64

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object; x and y are its centre in pixels."""

    kind: Kind
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What is there, and where."""

    content: Content
    things: tuple[Thing, ...]

    @property
    def background(self) -> str:
        """A scene always has one; its caption may not name it."""
        assert self.content.background
        return self.content.background

    @property
    def category(self) -> str:
        """`attribute` (one object), `relation` (two) or `count` (several of a kind)."""
        return "relation" if self.content.relation else "count" if self.content.count > 1 else "attribute"

    @property
    def captions(self) -> list[str]:
        """The full caption first, then a rewording of it, then one without the background."""
        return [*self.content.captions, *replace(self.content, background=None).captions]

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
    kind = _kind(rng, background, unseen)
    middle, drawn = SIDE / 2, rng.random()
    if drawn < 0.25:
        x, y = (middle + rng.uniform(-8, 8, size=2)).tolist()
        return Scene(Content((kind,), background), (Thing(kind, x, y),))
    if drawn < 0.5:
        kind = kind._replace(size=_pick(rng, ["small", "medium"]))
        quarters = rng.permutation(4)[: rng.integers(2, 5)]
        play = 14.3 - 1.1 * SIZES[kind.size]  # so that they touch neither each other nor the border
        places = middle + 15 * _QUARTERS[quarters] + rng.uniform(-play, play, (len(quarters), 2))
        content = Content((kind,), background, count=len(places))
        return Scene(content, tuple(Thing(kind, x, y) for x, y in places.tolist()))
    relation = _pick(rng, list(RELATIONS))
    dx, dy = RELATIONS[relation]
    alike = _pick(rng, ["shape", "colour", "", ""])
    other = kind
    while other[1:] == kind[1:] or (alike and getattr(other, alike) != getattr(kind, alike)):
        other = _kind(rng, background, unseen)
    things = []
    for sign, each in ((1, kind), (-1, other)):
        x = middle + sign * dx * 16 + rng.uniform(-1, 1) + (dx == 0) * rng.uniform(-6, 6)
        y = middle + sign * dy * 16 + rng.uniform(-1, 1) + (dy == 0) * rng.uniform(-6, 6)
        things.append(Thing(each, x, y))
    return Scene(Content((kind, other), background, relation), tuple(things))


def _kind(rng: np.random.Generator, background: str, unseen: bool) -> Kind:
    while True:
        colour, shape = _pick(rng, list(COLOURS)), _pick(rng, SHAPES)
        if held_out(colour, shape, background) == unseen:
            return Kind(_pick(rng, list(SIZES)), colour, shape)


def _pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, background: tuple[int, int, int]) -> None:
    size, colour, shape = thing.kind
    x, y, r = (value * _SUPERSAMPLING for value in (thing.x, thing.y, SIZES[size]))
    if shape in ("circle", "ring"):
        _disc(draw, x, y, r, COLOURS[colour])
        if shape == "ring":
            _disc(draw, x, y, 0.5 * r, background)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in _OUTLINES[shape]], fill=COLOURS[colour])


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _radial(radii: list[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(start + i * step), r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def _crescent(x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The unit disc without the disc of radius r around (x, y)."""
    distance, towards = math.hypot(x, y), math.atan2(y, x)
    outer = math.acos(
        (1 + distance**2 - r**2) / (2 * distance)
    )  # half the angle that the cut takes from the unit circle
    inner = math.acos((r**2 + distance**2 - 1) / (2 * r * distance))
    around = [towards + outer + (2 * math.pi - 2 * outer) * i / 40 for i in range(41)]
    back = [towards + math.pi + inner - 2 * inner * i / 30 for i in range(31)]
    return [(math.cos(a), math.sin(a)) for a in around] + [(x + r * math.cos(a), y + r * math.sin(a)) for a in back]


_QUARTERS = np.array([(-1, -1), (1, -1), (-1, 1), (1, 1)])
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _radial([1.1, 0.45] * 5),
    "diamond": [(0.0, -1.1), (0.75, 0.0), (0.0, 1.1), (-0.75, 0.0)],
    "moon": _crescent(0.6, -0.3, 0.85),
    "cross": [
        *((-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33)),
        *((0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33)),
    ],
}
