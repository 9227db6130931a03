"""Captions and real pictures of a dataset on the Hugging Face hub, or of local files that `datasets` reads."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sdprune.data.sources import CaptionSource, Row, caption_table
from sdprune.errors import InputError, unknown

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
        image: Column of pictures; only read when pictures are asked for.
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
        from PIL import Image

        column = self._column("image")
        try:
            picture = self._dataset[self._rows[row["id"]]][column]
            if isinstance(picture, Image.Image):
                return picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"Image {row['id']} of dataset {self.dataset} is damaged ({error}).") from error
        raise InputError(f"Column {column!r} of dataset {self.dataset} holds no picture for id {row['id']}.")

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

        try:
            return load_dataset(self.dataset, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"Cannot load split {self.split!r} of dataset {self.dataset!r}: {reason}") from error

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
