"""Grids of pictures with captions, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8


def grid(rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], smallest: int = 192) -> np.ndarray:
    """Named rows of uint8 [h, w, 3] pictures under one caption a column; small pictures are enlarged.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = next(iter(rows.values()))[0].shape[:2]
    scale = max(1, -(-smallest // min(height, width)))
    height, width = height * scale, width * scale
    size = max(13, width // 16)
    font = ImageFont.load_default(size)
    lines = [wrap(caption, max(8, int(width / (0.55 * size)))) for caption in captions]
    names = {name: wrap(name, 8 if max(map(len, rows)) < 9 else 16) for name in rows}
    side = int(0.62 * size * max(len(word) for words in names.values() for word in words)) + 2 * _MARGIN
    head = max(len(line) for line in lines) * (size + 3) + 2 * _MARGIN
    shape = (side + len(captions) * (width + _MARGIN), head + len(rows) * (height + _MARGIN))
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    for column, line in enumerate(lines):
        draw.text((side + column * (width + _MARGIN), _MARGIN), "\n".join(line), fill="black", font=font, spacing=3)
    for number, (name, pictures) in enumerate(rows.items()):
        top = head + number * (height + _MARGIN)
        middle = top + (height - len(names[name]) * (size + 3)) // 2
        draw.text((_MARGIN, middle), "\n".join(names[name]), fill="black", font=font, spacing=3)
        for column, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (side + column * (width + _MARGIN), top))
    return np.asarray(sheet)
