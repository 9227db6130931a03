"""Drawn pictures as files: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sdprune.errors import InputError
from sdprune.files import replacing

_NOT_FINITE = "sdprune not finite"


def save_png(path: Path, pixels: np.ndarray, finite: bool = True) -> None:
    """Write uint8 [h, w, 3] atomically; whether it came out of finite numbers goes into the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = PngInfo()
    if not finite:
        note.add_text(_NOT_FINITE, "true")
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=note)


class Picture(NamedTuple):
    """A picture that was kept."""

    pixels: np.ndarray
    """uint8 [h, w, 3]."""
    finite: bool
    """Whether it came out of finite numbers."""
    digest: int
    """Digest of the file, see `short_digest`."""


def short_digest(digest: str) -> int:
    """The first 63 bits of a SHA-256 in hexadecimal digits, as a number that arrays hold."""
    return int(digest[:16], 16) >> 1


def read_png(path: Path) -> Picture:
    """Read a picture.

    Raises:
        InputError: it is missing or damaged; a byte that changed is found by the checksums in the file.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # checks the sums, which reading the pixels does not
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            pixels, finite = np.array(image.convert("RGB")), _NOT_FINITE not in image.info
        return Picture(pixels, finite, short_digest(hashlib.sha256(content).hexdigest()))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise damaged_image(path) from error


def stacked(pictures: Sequence[Picture]) -> torch.Tensor:
    """uint8 [b, 3, h, w]."""
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)


def damaged_image(path: Path) -> InputError:
    """What to raise for a picture that is missing or damaged, with the next step."""
    results = next((one / "results.json" for one in path.parents if (one / "results.json").exists()), None)
    if results is not None:
        step = f"delete it and {results}, and run that record's command again; images that are whole are kept."
    elif path.parent.name == "samples":
        step = "run again; images that are there are kept."
    else:
        step = "delete it and run again; images that are whole are kept."
    return InputError(f"{path} is missing or damaged: {step}")
