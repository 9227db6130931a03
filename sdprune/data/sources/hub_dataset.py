"""Captions and real pictures of a dataset on the Hugging Face hub, or of local files that `datasets` reads."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sdprune.data.sources.base import CaptionSource, Row, caption_table, digest_of
from sdprune.errors import InputError, unknown
from sdprune.hub import asking_hub
from sdprune.outside import read_picture, reading

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


class HubDataset(CaptionSource):
    """A dataset of the Hugging Face hub, or a local path that `datasets.load_dataset` reads; it runs no remote code.

    Args:
        dataset: Hub id or local path (Parquet, Arrow, an image folder).
        split: For example `train`, or a slice such as `train[:1000]`.
        revision: Branch, tag or commit of the hub; give a commit for results that can be repeated.
        caption: Column of captions; where it holds lists, the first of each is taken.
        image: Column of pictures; only read when pictures are needed.
        id: Column of image ids (whole numbers or text): rows that repeat an id are further captions of its first row.
            Without it every row is an image and its number is the id.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        revision: Optional[str] = None,
        caption: str = "caption",
        image: str = "image",
        id: Optional[str] = None,
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.revision = revision
        self.columns = {"caption": caption, "image": image, "id": id}

    def prepare(self) -> None:
        """Download the dataset into the cache of `datasets`."""
        _ = self._dataset

    def load(self) -> "Dataset":
        """Read ids and captions. Files are named by row number: text ids may not be names of files."""
        rows = list(self._rows.values())
        names = [f"{row:012d}.jpg" for row in rows]
        origin, places = f"dataset {self.dataset}", [f"row {row}" for row in rows]
        return caption_table(origin, list(self._rows), names, self._captions(rows), [""] * len(rows), places)

    def image(self, row: Row) -> "Image":
        """Return the picture of a row, in RGB."""
        stored = self._pictures[self._rows[row["id"]]][self.columns["image"]]
        with reading(f"Image {row['id']} of dataset {self.dataset} is damaged", then=""):
            if stored is None:
                raise ValueError("it is empty")
            return read_picture(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))

    def digest(self, rows: Iterable[Row]) -> str:
        """Return the SHA-256 of the pictures as they are stored; none is decoded."""
        from datasets import Image

        rows = list(rows)
        column = self._column("image")
        if not isinstance(self._dataset.features[column], Image):
            return super().digest(rows)  # names what is no picture
        stored = self._dataset.select_columns([column]).cast_column(column, Image(decode=False))

        def content(row: Row) -> str:
            value = stored[self._rows[row["id"]]][column] or {}
            try:
                return hashlib.sha256(value.get("bytes") or Path(value.get("path") or "").read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"Image {row['id']} of dataset {self.dataset} cannot be read ({error}).") from error

        return digest_of([row["id"] for row in rows], self._each(rows, content))

    def describe(self) -> dict[str, Any]:
        """Return the class, the options and the SHA-256 of ids and captions."""
        table = self.load()
        content = json.dumps([list(table["id"]), list(table["caption"])]).encode()
        name = None if Path(self.dataset).exists() else self.dataset
        options = {"dataset": name, "revision": self.revision, "split": self.split, "columns": self.columns}
        return {"class": type(self).__name__, **options, "captions": hashlib.sha256(content).hexdigest()}

    @cached_property
    def _dataset(self) -> "Dataset":
        from datasets import load_dataset

        what = f"Split {self.split!r} of dataset {self.dataset!r}"
        here, then = Path(self.dataset).exists(), "Connect, or give a local path."
        with reading(f"{what} cannot be loaded", "Check its name.") if here else asking_hub(what, then):
            return load_dataset(self.dataset, split=self.split, revision=self.revision)

    @cached_property
    def _pictures(self) -> "Dataset":
        """The column of pictures, each as it is stored: {"bytes": ..., "path": ...}."""
        from datasets import Image

        column = self._column("image")
        if not isinstance(self._dataset.features[column], Image):
            raise InputError(f"Column {column!r} of dataset {self.dataset} holds no pictures. Name another.")
        return self._dataset.select_columns([column]).cast_column(column, Image(decode=False))

    @cached_property
    def _rows(self) -> dict[Any, int]:
        """Row numbers in the dataset by image id, the first of each id."""
        if self.columns["id"] is None:
            return {row: row for row in range(len(self._dataset))}
        rows: dict[Any, int] = {}
        for row, image_id in enumerate(self._values("id")):
            rows.setdefault(image_id, row)
        return rows

    def _captions(self, rows: Sequence[int]) -> list[Any]:
        values = self._values("caption")
        first = (values[row] for row in rows)
        return [(value[0] if value else "") if isinstance(value, list) else value for value in first]

    def _values(self, role: str) -> list[Any]:
        column = self._column(role)
        return list(self._dataset.select_columns([column])[:][column])

    def _column(self, role: str) -> str:
        column = self.columns[role]
        if column is None or column not in self._dataset.column_names:
            raise unknown(f"{role} column of dataset {self.dataset}", column, self._dataset.column_names)
        return column
