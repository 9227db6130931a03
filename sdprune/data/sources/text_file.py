"""Prompts in a text file."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from sdprune.data.sources.base import CaptionSource, Row, caption_table
from sdprune.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


class TextFile(CaptionSource):
    """One prompt a line, in UTF-8, for calibration: it has no pictures.

    Args:
        path: The file. Ids are line numbers from 0; empty lines are only allowed at the end.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)

    def load(self) -> "Dataset":
        """Read the prompts, one row a line."""
        try:
            lines = [line.strip() for line in self._bytes().decode("utf-8-sig").rstrip().split("\n")]
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
        names = [f"{line:012d}.jpg" for line in range(len(lines))]
        places = [f"line {number}" for number in range(1, len(lines) + 1)]
        return caption_table(str(self.path), list(range(len(lines))), names, lines, [""] * len(lines), places)

    def image(self, row: Row) -> "Image":
        """Raise: there are no pictures in a text file."""
        raise InputError(f"{self.path} has prompts only, no real images: use a file of statistics as the reference.")

    def describe(self) -> dict[str, Any]:
        """Return the class and the SHA-256 of the file."""
        return {"class": type(self).__name__, "prompts": hashlib.sha256(self._bytes()).hexdigest()}

    def check(self, rows: Iterable[Row]) -> None:
        """Raise at once: there are no pictures in a text file."""
        self.image({})

    def digest(self, rows: Iterable[Row]) -> str:
        """Raise at once: there are no pictures in a text file."""
        self.image({})
        return ""

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read prompts from {self.path}: {error.strerror}. Give a text file.") from error
