"""What every caption source is, and the table that it gives."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar, Union

from sdprune.errors import InputError

if TYPE_CHECKING:  # `datasets` and PIL take seconds to import: at run time they are imported where they are used
    from datasets import Dataset
    from PIL.Image import Image

Row = Mapping[str, Any]
T = TypeVar("T")
_INT64 = range(-(2**63), 2**63)


class CaptionSource(ABC):
    """A table of captions, one row per image, and the real images that belong to them, where there are any.

    A subclass gives `load`, `image` and `describe`; `prepare`, `check` and `digest` have defaults.
    """

    def prepare(self) -> None:  # noqa: B027  an optional hook
        """Make what `load` reads (download, render), before `load`; must be safe and cheap to repeat.

        Under a trainer one process a node calls it; without one every process may, at the same time.
        """

    @abstractmethod
    def load(self) -> "Dataset":
        """Return the table: `id` (int64 or string), `file_name`, `caption` (an image's first), `path` (str, may be "").

        Raises:
            InputError: The source is missing, damaged, or has an empty caption.
        """

    @abstractmethod
    def image(self, row: Row) -> "Image":
        """Return the real picture of a row of `load()`, in RGB.

        Raises:
            InputError: The picture is missing or damaged, or the source has none.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a result depends on, as JSON: the class, its options, a hash of the content; no local paths."""

    def check(self, rows: Iterable[Row]) -> None:
        """Read the images of `rows` in full, so that nothing costly starts without them.

        Raises:
            InputError: Naming the images that are missing or damaged.
        """
        self._each(rows, lambda row: self.image(row).close())

    def digest(self, rows: Iterable[Row]) -> str:
        """Return the SHA-256 of the images of `rows`, with their ids: what is compared with them depends on it.

        Raises:
            InputError: Naming the images that are missing or damaged.
        """
        rows = list(rows)
        return digest_of([row["id"] for row in rows], self._each(rows, lambda row: pixel_digest(self.image(row))))

    @staticmethod
    def _each(rows: Iterable[Row], read: Callable[[Row], T]) -> list[T]:
        """What `read` returns for each row; the problems with all of them in one error."""

        def attempt(row: Row) -> Union[T, InputError]:
            try:
                return read(row)
            except InputError as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(attempt, rows))
        if problems := [str(one).rstrip(".") for one in found if isinstance(one, InputError)]:
            raise InputError(f"{len(problems)} real images cannot be used: {shown(problems, '; ')}. Replace them.")
        return [one for one in found if not isinstance(one, InputError)]


def is_text(value: object) -> bool:
    """Whether a value is text that can be encoded; JSON can hold halves of a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def caption_table(
    origin: str,
    ids: list[Any],
    names: list[str],
    captions: list[Any],
    paths: list[str],
    places: Optional[list[str]] = None,
) -> "Dataset":
    """Return the table of `CaptionSource.load`.

    Args:
        origin: What messages call the source.
        ids: One an image.
        names: File names.
        captions: Texts.
        paths: Where pictures are, or "".
        places: What messages call each row, as in `line 3`; by default its file name.

    Raises:
        InputError: It is empty, has ids of several types, an empty caption, or images whose drawn pictures would be
            one file.
    """
    from datasets import Dataset

    if not ids:
        raise InputError(f"{origin} holds no captions.")
    if len(kinds := {type(image_id) for image_id in ids}) > 1 or not kinds <= {int, str}:
        found = sorted(kind.__name__ for kind in kinds)
        raise InputError(f"{origin} has ids of type {', '.join(found)}; expected whole numbers or text, not both.")
    wrong = [value for value in ids if not (value in _INT64 if isinstance(value, int) else is_text(value))]
    if wrong:
        raise InputError(f"{origin} has ids that are no text and no 64-bit numbers: {shown(map(ascii, wrong))}.")
    rows = list(zip(places or names, captions, strict=True))
    broken = [place for place, text in rows if isinstance(text, str) and not is_text(text)]
    if broken:
        raise InputError(f"{origin} has captions that are not valid Unicode for {shown(broken)}. Correct them.")
    empty = [place for place, text in rows if not isinstance(text, str) or not text.strip()]
    if empty:
        raise InputError(f"{origin} has empty captions for {shown(empty)}. Give each a text or remove it.")
    _check_drawn_names(origin, names)
    return Dataset.from_dict({"id": ids, "file_name": names, "caption": captions, "path": paths})


def drawn_name(file_name: str) -> str:
    """Return the name of the picture that is drawn for an image: its own, with .png for .jpg or after all else."""
    return file_name.removesuffix(".jpg") + ".png"


def _check_drawn_names(origin: str, names: Iterable[str]) -> None:
    """Refuse the few names that would still meet: a.png beside a.png.jpg, or a.jpg beside a.png/b.jpg."""
    drawn: dict[Path, str] = {}
    for name in names:
        path = Path(drawn_name(name))
        if path in drawn:
            raise InputError(f"{origin}: {drawn[path]} and {name} would both be drawn into {path}: rename one of them.")
        drawn[path] = name
    for path, name in drawn.items():
        for folder in path.parents:
            if folder in drawn:
                raise InputError(
                    f"{origin}: {drawn[folder]} would be drawn into {folder}, the folder of {name}: rename it."
                )


def digest_of(ids: Iterable[Any], digests: Iterable[str]) -> str:
    """Return one SHA-256 over the ids of images and the digests of their contents."""
    return hashlib.sha256(json.dumps([list(ids), list(digests)]).encode()).hexdigest()


def pixel_digest(image: "Image") -> str:
    """Return the SHA-256 of a picture's size, mode and pixels."""
    return hashlib.sha256(f"{image.size}{image.mode}".encode() + image.tobytes()).hexdigest()


def shown(values: Iterable[Any], separator: str = ", ") -> str:
    """Join the first five values, and say how many there are."""
    texts = [str(value) for value in values]
    return separator.join(texts[:5]) + (f"{separator}... ({len(texts)} in all)" if len(texts) > 5 else "")
