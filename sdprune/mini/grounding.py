"""What encoders are taught beside the contrast of pictures and captions: to say what stands where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdprune.mini.captions import COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, Content
from sdprune.mini.models import TEXT_WIDTH

_CHOICES = len(COLOURS), len(SHAPES), len(SIZES), 1 + len(NUMBERS)
ANSWERS = 2 + sum(_CHOICES)
"""Numbers that say of an object its side across and down, and score each colour, shape, size and count."""


class Grounded(nn.Module):
    """A text encoder with two heads that are thrown away: they read from its states what stands where.

    A causal text encoder knows of the first object where it stands only in later tokens. The U-Net attends to the
    padding too, so the last two tokens are made to hold the two objects, and the layout is read as a U-Net reads it.
    """

    def __init__(self, text: nn.Module):
        super().__init__()
        self.text = text
        self.objects = nn.Linear(TEXT_WIDTH, ANSWERS)
        self.layout = LayoutHead(TEXT_WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Objects [b, 2, ANSWERS] and layout [b, 64, 12] of tokens [b, MAX_LENGTH]."""
        states = self.text(tokens)[0]
        return self.objects(states[:, -2:]), self.layout(states)


class LayoutHead(nn.Module):
    """Texts' states [b, length, width] to pictures of 16 x 16 pixels, as 8 x 8 places of 4 colours: [b, 64, 12]."""

    def __init__(self, width: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(64, width))
        self.attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.colours = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 12))

    def forward(self, states: Tensor) -> Tensor:
        """One cross-attention from every place."""
        places = self.places.expand(len(states), -1, -1)
        return self.colours(self.attention(places, states, states, need_weights=False)[0])


def grounding_loss(found: tuple[Tensor, Tensor], pictures: Tensor, contents: list[Content]) -> Tensor:
    """Squared errors of sides and of the layout, cross-entropies of what the objects are.

    Args:
        found: what Grounded says of the captions.
        pictures: that the captions describe, [b, 3, 64, 64] in [-1, 1].
        contents: of the pictures.
    """
    objects, drawn = found
    return 10 * F.mse_loss(drawn.float(), layout(pictures)) + objects_loss(objects, contents)


def objects_loss(objects: Tensor, contents: list[Content]) -> Tensor:
    """Squared errors of sides, cross-entropies of what the objects are; objects [b, 2, ANSWERS]."""
    said = torch.tensor([said_objects(content) for content in contents], device=objects.device)
    said, objects = (table[said[..., 2] >= 0] for table in (said, objects.float()))
    sides, *kinds = objects.split([2, *_CHOICES], dim=-1)
    loss = 2 * F.mse_loss(sides, said[:, :2].float())
    return loss + sum(F.cross_entropy(logits, said[:, 2 + i]) for i, logits in enumerate(kinds))


def layout(pictures: Tensor) -> Tensor:
    """What LayoutHead is to draw of pictures [b, 3, 64, 64]: how they differ from their background."""
    return F.pixel_unshuffle(F.avg_pool2d(pictures - pictures[..., :1, :1], 4), 2).flatten(2).transpose(1, 2)


def said_objects(content: Content) -> list[list[int]]:
    """Of each of two objects its side across and down, and the numbers of its colour, shape, size and count; -1: none.

    The side is where it stands to the other one, 0 for one that is alone.
    """
    across, down = RELATIONS[content.relation] if content.relation else (0, 0)
    rows = [
        [sign * across, sign * down, list(COLOURS).index(kind.colour), SHAPES.index(kind.shape),
         list(SIZES).index(kind.size), content.count - 1]
        for sign, kind in zip((1, -1), content.kinds, strict=False)
    ]  # fmt: skip
    return [*rows, *[[0, 0, -1, -1, -1, -1]] * (2 - len(rows))]
