"""COCO's own layout."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from sdprune.data.sources.base import CaptionSource, Row, caption_table, digest_of, drawn_name, is_text, shown
from sdprune.errors import InputError, unknown
from sdprune.identity import FileDigests
from sdprune.outside import read_json, read_picture, reading

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_LEAVES_DIRECTORY = re.compile(r"\.?$|[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)|.*\0", re.DOTALL)
_LONGEST_NAME = 245  # bytes; file systems allow 255, and a file has ten more while it is being written
_LONGEST_PATH = 1024


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
        is_text(name)
        and name.isprintable()
        and len(name.encode()) <= _LONGEST_PATH
        and all(len(part.encode()) <= _LONGEST_NAME for part in Path(drawn_name(name)).parts)
    )
