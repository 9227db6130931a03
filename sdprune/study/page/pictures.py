"""Pictures of runs as small files beside the page, and what the script needs to find them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from os import cpu_count
from pathlib import Path
from typing import Any

from PIL import Image

from sdprune.errors import InputError
from sdprune.files import replacing
from sdprune.runs.png import read_png

SAMPLE_SIDE, COLUMNS = 384, 16
LARGE = 256
"""Pixels a side; larger pictures have no sheet, the page links to the files of the run."""
EMBEDDED = 15e6
"""Bytes of all sample pictures in a page of a single file, which writes 4 for 3 of them."""
_GREY = (128, 128, 128)


class Pictures:
    """Small pictures in a folder, made once: a file's name depends on the files that it was made of.

    Args:
        folder: where they go; None to have them as data addresses instead.
        count: of all sample pictures. As data addresses they are as small as EMBEDDED needs.
    """

    def __init__(self, folder: Path | None, count: int) -> None:
        self.folder = folder
        self.room = EMBEDDED / max(1, count) if folder is None else float("inf")
        """Bytes of a sample picture."""

    def samples(self, directory: Path, count: int) -> list[str | None]:
        """Return an address for each of a run's sample pictures; None where it is missing or damaged."""
        return [self._sample(directory / "samples" / f"{place}.png") for place in range(count)]

    def _sample(self, path: Path) -> str | None:
        def make() -> bytes | None:
            picture = _read(path, SAMPLE_SIDE)
            if picture is None:
                return None
            content = _bytes(picture, "WEBP", lossless=min(picture.size) <= 128, quality=88)
            while len(content) > self.room and min(picture.size) > 32:
                picture.thumbnail((picture.width * 3 // 4, picture.height * 3 // 4))
                content = _bytes(picture, "WEBP", quality=80)
            return content

        return self._file(path.parents[1].name, [path], "webp", make)

    def sheet(self, directory: Path, paths: Sequence[Path]) -> str | None:
        """Return the address of one picture with all of these, row by row; grey is missing.

        None where there are none, or where they are large.
        """
        if _is_large(paths):
            return None

        def make() -> bytes | None:
            found = [_read(path, LARGE // 2) for path in paths]
            sizes = [one.size for one in found if one is not None]
            if not sizes:
                return None
            side = max(map(max, sizes))
            sheet = Image.new("RGB", (side * COLUMNS, side * -(-len(found) // COLUMNS)), _GREY)
            for place, one in enumerate(found):
                if one is not None:
                    sheet.paste(one, (side * (place % COLUMNS), side * (place // COLUMNS)))
            return _bytes(sheet, "JPEG", quality=88, subsampling=0)

        return self._file(directory.name, paths, "jpg", make)

    def _file(self, stem: str, sources: Sequence[Path], suffix: str, make: Any) -> str | None:
        if self.folder is None:
            content = make()
            return None if content is None else f"data:image/{suffix};base64,{base64.b64encode(content).decode()}"
        name = f"{re.sub(r'[^A-Za-z0-9.-]', '_', stem)[:60]}-{_key(sources)}.{suffix}"
        path = self.folder / name
        if not path.exists():
            content = make()
            if content is None:
                return None
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        return f"{self.folder.name}/{name}"


def all_of(jobs: Iterable[Any]) -> list[Any]:
    """Call each of these on threads and return what they return, in order; reading pictures leaves Python's lock."""
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        return [done.result() for done in [pool.submit(job) for job in jobs]]


def _key(sources: Sequence[Path]) -> str:
    facts = []
    for path in sources:
        try:
            found = path.stat()
            facts.append(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}")
        except (OSError, RuntimeError, ValueError):  # missing, a loop of links, a name that no file can have
            facts.append(str(path))
    return sha256("\n".join(facts).encode(errors="replace")).hexdigest()[:12]


def _is_large(paths: Iterable[Path]) -> bool:
    """Whether the first of these that can be opened is large."""
    for path in paths:
        with suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError), Image.open(path) as picture:
            return max(picture.size) > LARGE
    return False


def _read(path: Path, side: int) -> Image.Image | None:
    """Read a picture, no larger than `side`; None where it is missing or damaged."""
    try:
        picture = Image.fromarray(read_png(path).pixels)
        picture.thumbnail((side, side))
        return picture
    except (InputError, ValueError, Image.DecompressionBombError):
        return None


def _bytes(picture: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()
