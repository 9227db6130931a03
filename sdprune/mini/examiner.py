"""The examiner: a small detector that says what a picture shows, and whether that is what a caption says."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdprune.mini.captions import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Content, Kind
from sdprune.mini.world import SIDE, Scene, Thing

CELL = 4  # pixels a side
_CHOICES = (tuple(COLOURS), SHAPES, tuple(SIZES))


class Reading(NamedTuple):
    """What a picture shows."""

    background: str
    things: list[Thing]


class Examiner(nn.Module):
    """For each of 16 x 16 cells whether an object's centre lies there, and its colour, shape and size."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=d, dilation=d), nn.SiLU())
            for d in (1, 2, 4, 1, 2, 4, 1)
        )
        self.objects = nn.Conv2d(width, 1 + sum(map(len, _CHOICES)), 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits of pictures [b, 3, 64, 64] in [-1, 1].

        Returns:
            Of centres [b, 16, 16], of each colour, shape and size [b, choices, 16, 16], of backgrounds [b, 4].
        """
        x = self.stem(pictures)
        for block in self.blocks:
            x = x + block(x)
        centres, *kinds = self.objects(x).split([1, *map(len, _CHOICES)], dim=1)
        return centres[:, 0], kinds, self.background(x.mean((2, 3)))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[Reading]:
        """What uint8 pictures [b, 3, h, w] show: one object at each cell that is more likely than its neighbours."""
        pixels = pictures.float() / 127.5 - 1
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
        centres, kinds, backgrounds = self(pixels)
        peaks = (centres > 0) & (centres == F.max_pool2d(centres[:, None], 5, stride=1, padding=2)[:, 0])
        names = [one.argmax(1) for one in kinds]
        things: list[list[Thing]] = [[] for _ in pictures]
        for picture, row, column in peaks.nonzero().tolist():
            colour, shape, size = (c[int(n[picture, row, column])] for c, n in zip(_CHOICES, names, strict=True))
            things[picture].append(Thing(Kind(size, colour, shape), (column + 0.5) * CELL, (row + 0.5) * CELL))
        grounds = [list(BACKGROUNDS)[i] for i in backgrounds.argmax(1).tolist()]
        return [Reading(*reading) for reading in zip(grounds, things, strict=True)]

    def save(self, directory: Path) -> None:
        """Write the weights in fp16."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, _file(directory))

    @classmethod
    def load(cls, directory: Path) -> Examiner:
        """Read the weights."""
        from safetensors.torch import load_file

        examiner = cls()
        examiner.load_state_dict(load_file(_file(directory)))
        return examiner.eval().requires_grad_(False)


def judge(said: Content, reading: Reading) -> dict[str, bool]:
    """Whether a picture shows what a caption says, by those categories that the caption has.

    attribute: the only object has the colour, the shape and, where it is said, the size. object: so have the two.
    relation: and they stand as said. count: there are as many objects as said, each of this kind. background: its
    colour. Anything else in the picture makes it wrong.
    """
    wanted = said.kinds * said.count
    orders = permutations(reading.things) if len(reading.things) == len(wanted) else []
    fitting = [order for order in orders if all(map(_fits, wanted, order))]
    found: dict[str, bool] = {}
    if said.relation:
        found["object"] = bool(fitting)
        found["relation"] = any(stands(said.relation, first, second) for first, second in fitting)
    else:
        found["attribute" if said.count == 1 else "count"] = bool(fitting)
    if said.background:
        found["background"] = reading.background == said.background
    return found


def stands(relation: str, first: Thing, second: Thing) -> bool:
    """Whether the first stands so to the second: farther in this direction than aside."""
    across, down = first.x - second.x, first.y - second.y
    dx, dy = RELATIONS[relation]
    return across * dx + down * dy > abs(across * dy) + abs(down * dx)


def _fits(said: Kind, thing: Thing) -> bool:
    return thing.kind[1:] == said[1:] and said.size in ("medium", thing.kind.size)


def examiner_loss(output: tuple[Tensor, list[Tensor], Tensor], scenes: list[Scene]) -> Tensor:
    """Cross-entropies of centres, of what lies at the cells near one, and of backgrounds."""
    centres, kinds, backgrounds = output
    heat, nearest = (target.to(centres.device) for target in _targets(scenes))
    loss = 8 * F.binary_cross_entropy_with_logits(centres.float(), heat)
    near = heat > 0.5
    for logits, labels in zip(kinds, nearest, strict=True):
        loss = loss + F.cross_entropy(logits.float().permute(0, 2, 3, 1)[near], labels[near])
    grounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes], device=centres.device)
    return loss + F.cross_entropy(backgrounds.float(), grounds)


def _targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Nearness to a centre [b, 16, 16] in 0 .. 1, and colour, shape and size of the nearest object [3, b, 16, 16]."""
    middle = (torch.arange(SIDE // CELL) + 0.5) * CELL
    heats, labels = [], []
    for scene in scenes:
        x, y = (torch.tensor(c)[:, None, None] for c in zip(*((t.x, t.y) for t in scene.things), strict=True))
        squared = ((middle - x) ** 2 + (middle[:, None] - y) ** 2) / CELL**2
        nearest, which = squared.min(0)
        heats.append(torch.exp(-nearest / 2))
        table = torch.tensor(
            [
                [list(names).index(value) for names, value in zip(_CHOICES, (k.colour, k.shape, k.size), strict=True)]
                for k in (t.kind for t in scene.things)
            ]
        )
        labels.append(table[which].permute(2, 0, 1))
    return torch.stack(heats), torch.stack(labels, 1)


def _file(directory: Path) -> str:
    return str(directory / "model.safetensors")


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def disturbed(pictures: Tensor) -> Tensor:
    """Pictures [b, 3, 64, 64] in [-1, 1] as a decoder may give them back: blurred, quantised, tinted, noisy."""
    b = len(pictures)
    some = lambda share: (torch.rand(b, 1, 1, 1, device=pictures.device) < share).float()  # noqa: E731
    rand = lambda *shape: torch.rand(b, *shape, device=pictures.device)  # noqa: E731
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = pictures.lerp(soft, rand(1, 1, 1) * some(0.6))
    step = rand(1, 1, 1, 1, 1) * 0.5 + 0.02
    blocks = pictures.unfold(2, 8, 8).unfold(3, 8, 8)
    frequencies = _DCT @ blocks @ _DCT.T
    coarse = _DCT.T @ ((frequencies / step).round() * step) @ _DCT
    pictures = pictures.lerp(coarse.permute(0, 1, 2, 4, 3, 5).reshape(pictures.shape), some(0.5))
    pictures = pictures * (1 + 0.16 * (rand(3, 1, 1) - 0.5)) + 0.16 * (rand(3, 1, 1) - 0.5)
    return (pictures + 0.15 * rand(1, 1, 1) * some(0.6) * torch.randn_like(pictures)).clamp(-1, 1)


_k = torch.arange(8.0)
_DCT = torch.cos(torch.pi * _k[:, None] * (2 * _k + 1) / 16) * torch.where(_k == 0, 8**-0.5, 0.5)[:, None]
