"""Where captions and real pictures come from: COCO's own layout or a text file (the hub: hub.py)."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar, Union

from sdprune.errors import InputError, unknown
from sdprune.identity import FileDigests
from sdprune.outside import read_json, read_picture, reading

if TYPE_CHECKING:  # `datasets` and PIL take seconds to import: at run time they are imported where they are used
    from datasets import Dataset
    from PIL.Image import Image

Row = Mapping[str, Any]
T = TypeVar("T")
_LEAVES_DIRECTORY = re.compile(r"\.?$|[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)|.*\0", re.DOTALL)
_LONGEST_NAME = 245  # bytes; file systems allow 255, and a file has ten more while it is being written
_LONGEST_PATH = 1024
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


class CocoDirectory(CaptionSource):
    """COCO's official layout, 2014 or 2017: `annotations/captions_<split>.json` and `<split>/<file_name>`.

    Rows follow the first appearance of each image in `annotations`, as in the study, not the order of `images`.
    The pictures may be absent where only captions are needed (calibration, a reference of statistics).

    Args:
        root: The directory that holds both parts.
        split: For example `train2017`, `val2014`.
    """

    def __init__(self, root: Union[str, Path], split: str = "train2017") -> None:
        self.root = Path(root)
        self.split = split

    def load(self) -> "Dataset":
        """Parse the captions of the split (118,287 images of train2017 in seconds). See `CaptionSource.load`."""
        file = self._annotation_file()
        content = read_json(file, "Unpack or download it again.")
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            captions: dict[Any, str] = {}
            for annotation in content["annotations"]:
                captions.setdefault(annotation["image_id"], annotation["caption"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{file} is damaged or holds no captions ({type(error).__name__}: {error}): expected COCO's `images` "
                "with `id` and `file_name`, and `annotations` with `image_id` and `caption`."
            ) from error
        _check_images(file, names, captions, [image["id"] for image in content["images"]])
        file_names = [names[image_id] for image_id in captions]
        directory = str(self.root.absolute() / self.split)
        paths = [os.path.join(directory, name) for name in file_names]
        return caption_table(str(file), list(captions), file_names, list(captions.values()), paths)

    def image(self, row: Row) -> "Image":
        """Return the picture of a row, in RGB; refuses one that a link leads out of the image directory."""
        with reading(f"{row['file_name']} is damaged", then=""):
            return read_picture(self._path(row))

    def describe(self) -> dict[str, Any]:
        """Return the class, the split and the SHA-256 of the annotation file."""
        with self._annotation_file().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"class": type(self).__name__, "split": self.split, "annotations": digest}

    def check(self, rows: Iterable[Row]) -> None:
        """Read the images of `rows` in full. See `CaptionSource.check`."""
        self._image_directory()
        super().check(rows)

    def digest(self, rows: Iterable[Row]) -> str:
        """Return the SHA-256 of the picture files; one that has not changed since the last time is not read again."""
        rows = list(rows)
        directory = self._image_directory().resolve()
        ids = [row["id"] for row in rows]
        digests = dict(zip(ids, FileDigests(str(directory)).of(self._each(rows, self._path)), strict=True))

        def content(row: Row) -> str:
            digest = digests[row["id"]]
            if isinstance(digest, OSError):
                raise InputError(f"{row['file_name']} cannot be read ({digest.strerror}).")
            return digest

        return digest_of(ids, self._each(rows, content))

    def _path(self, row: Row) -> Path:
        path = Path(row["path"])
        with reading(f"{row['file_name']} is damaged", then=""):
            if not path.resolve().is_relative_to(self._image_directory().resolve()):
                raise InputError(f"{row['file_name']} leaves the image directory {self.root / self.split}.")
            if not path.is_file():
                raise InputError(f"{row['file_name']} is missing from {self.root / self.split}.")
        return path

    def _annotation_file(self) -> Path:
        expected = "expected COCO's layout, annotations/captions_<split>.json beside <split>/<images>"
        if not self.root.is_dir():
            raise InputError(f"COCO directory {self.root} does not exist: {expected}.")
        file = self.root / "annotations" / f"captions_{self.split}.json"
        if file.is_file():
            return file
        splits = sorted(other.stem.removeprefix("captions_") for other in file.parent.glob("captions_*.json"))
        if splits:
            raise unknown(f"split of {self.root}", self.split, splits)
        raise InputError(f"{self.root} has no annotations/{file.name} nor any other captions: {expected}.")

    def _image_directory(self) -> Path:
        directory = self.root / self.split
        if not directory.is_dir():
            raise InputError(
                f"{self.root} has no image directory {self.split}/, expected beside annotations/. "
                "Unpack the images there, or compare with a file of statistics instead."
            )
        return directory


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


def _check_images(file: Path, names: Mapping[Any, Any], captions: Mapping[Any, str], ids: list[Any]) -> None:
    """Refuse ids and file names under which images could be confused, lost, or read from elsewhere."""
    missing = [image_id for image_id in captions if image_id not in names]
    if missing:
        raise InputError(f"{file} has captions of unknown image ids: {shown(missing)}. Every id must be in `images`.")
    leaving = [name for name in names.values() if not isinstance(name, str) or _LEAVES_DIRECTORY.match(name)]
    if leaving:
        raise InputError(
            f"{file} has file names that leave the image directory: {shown(map(repr, leaving))}. "
            "Expected paths relative to it, without '..'."
        )
    unwritable = [name for name in names.values() if not _is_writable(name)]
    if unwritable:
        raise InputError(
            f"{file} has file names that cannot be written: {shown(map(ascii, unwritable))}. Expected text without "
            f"control characters, each part of at most {_LONGEST_NAME} bytes, {_LONGEST_PATH} in all."
        )
    for kind, values in (("ids", ids), ("file names", names.values())):
        if repeated := [value for value, times in Counter(values).items() if times > 1]:
            raise InputError(f"{file} lists {kind} of images twice: {shown(repeated)}. Give every image its own.")


def _is_writable(name: str) -> bool:
    """Whether an image can be written under this name, with `.png` as its suffix."""
    return (
        _is_text(name)
        and name.isprintable()
        and len(name.encode()) <= _LONGEST_PATH
        and all(len(part.encode()) <= _LONGEST_NAME for part in Path(drawn_name(name)).parts)
    )


def _is_text(value: object) -> bool:
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
    wrong = [value for value in ids if not (value in _INT64 if isinstance(value, int) else _is_text(value))]
    if wrong:
        raise InputError(f"{origin} has ids that are no text and no 64-bit numbers: {shown(map(ascii, wrong))}.")
    rows = list(zip(places or names, captions, strict=True))
    broken = [place for place, text in rows if isinstance(text, str) and not _is_text(text)]
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
