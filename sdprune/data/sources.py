"""Where captions and real pictures come from: COCO's own layout or a text file (the hub: hub.py)."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from sdprune.errors import InputError, unknown

if TYPE_CHECKING:  # `datasets` and PIL take seconds to import: at run time they are imported where they are used
    from datasets import Dataset
    from PIL.Image import Image

Row = Mapping[str, Any]
_LEAVES_DIRECTORY = re.compile(r"\.?$|[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)|.*\0", re.DOTALL)


class CaptionSource(ABC):
    """A table of captions, one row per image, and the real images that belong to them, where there are any.

    A subclass gives `load`, `image` and `describe`; `prepare` and `check` have defaults.
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
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            problems = [problem for problem in pool.map(self._problem, rows) if problem]
        if problems:
            raise InputError(f"{len(problems)} real images cannot be used: {shown(problems, '; ')}. Restore them.")

    def _problem(self, row: Row) -> Optional[str]:
        try:
            self.image(row)
        except InputError as error:
            return str(error).rstrip(".")
        return None


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
        content = _read_json(file)
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
        _check_images(file, names, captions, len(content["images"]))
        file_names = [names[image_id] for image_id in captions]
        directory = str(self.root.absolute() / self.split)
        paths = [os.path.join(directory, name) for name in file_names]
        return caption_table(str(file), list(captions), file_names, list(captions.values()), paths)

    def image(self, row: Row) -> "Image":
        """Return the picture of a row, in RGB; refuses one that a link leads out of the image directory."""
        from PIL import Image

        path = Path(row["path"])
        if not path.resolve().is_relative_to(self._image_directory().resolve()):
            raise InputError(f"{row['file_name']} leaves the image directory {self.root / self.split}.")
        if not path.is_file():
            raise InputError(f"{row['file_name']} is missing from {self.root / self.split}.")
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{row['file_name']} is damaged ({error}).") from error

    def describe(self) -> dict[str, Any]:
        """Return the class, the split and the SHA-256 of the annotation file."""
        with self._annotation_file().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"class": type(self).__name__, "split": self.split, "annotations": digest}

    def check(self, rows: Iterable[Row]) -> None:
        """Read the images of `rows` in full. See `CaptionSource.check`."""
        self._image_directory()
        super().check(rows)

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
            raise InputError(f"{self.path} is not UTF-8 text ({error}). Expected one prompt a line.") from error
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

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read prompts from {self.path}: {error.strerror}.") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}): unpack or download it again.") from error


def _check_images(file: Path, names: Mapping[Any, Any], captions: Mapping[Any, str], listed: int) -> None:
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
    repeated = [name for name, times in Counter(names.values()).items() if times > 1]
    if repeated or len(names) < listed:
        raise InputError(f"{file} lists images twice (ids or file names): {shown(repeated or ['ids'])}.")


def caption_table(
    origin: str,
    ids: list[Any],
    names: list[str],
    captions: list[Any],
    paths: list[str],
    places: Optional[list[str]] = None,
) -> "Dataset":
    """Return the table of `CaptionSource.load`, refusing an empty one, mixed ids and empty captions.

    Args:
        origin: What messages call the source.
        ids: One an image.
        names: File names.
        captions: Texts.
        paths: Where pictures are, or "".
        places: What messages call each row, as in `line 3`; by default its file name.
    """
    from datasets import Dataset

    if not ids:
        raise InputError(f"{origin} holds no captions.")
    if len(kinds := {type(image_id) for image_id in ids}) > 1 or not kinds <= {int, str}:
        found = sorted(kind.__name__ for kind in kinds)
        raise InputError(f"{origin} has ids of type {', '.join(found)}; expected whole numbers or text, not both.")
    rows = zip(places or names, captions, strict=True)
    empty = [place for place, text in rows if not isinstance(text, str) or not text.strip()]
    if empty:
        raise InputError(f"{origin} has empty captions for {shown(empty)}. Give each a text or remove it.")
    return Dataset.from_dict({"id": ids, "file_name": names, "caption": captions, "path": paths})


def shown(values: Iterable[Any], separator: str = ", ") -> str:
    """Join the first five values, and say how many there are."""
    texts = [str(value) for value in values]
    return separator.join(texts[:5]) + (f"{separator}... ({len(texts)} in all)" if len(texts) > 5 else "")
