"""A run's directory, fingerprint and results: the only thing that studies read.

<output>/<label>-<fingerprint>/
    config.json      every fact that the fingerprint covers
    images/*.png     one image a prompt, under the name of its COCO image
    samples/*.png    the fixed prompts; grid.png shows them, the dense model's above
    images.csv       captions with the scores of each image, for people
    rows.npz         `ids`, for every image, in drawn order, what the metrics keep of it, and the `facts` of each column
    results.json     written last: a run that has it is finished
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from sdprune.data.batches import Batch
from sdprune.data.sources import drawn_name
from sdprune.errors import InputError
from sdprune.files import read_json, replacing, require_writable, write_json
from sdprune.identity import FileDigests, fingerprint, own_version
from sdprune.runs.png import damaged_image, read_png, short_digest

if TYPE_CHECKING:
    import pandas as pd

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    return {"sdprune": own_version(), **{name: version(name) for name in _PACKAGES}}


def clock(seconds: float) -> str:
    """A time in seconds since 1970 for people: local, to the second, with the offset to UTC, as in ISO 8601."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


class Record:
    """One run's directory.

    Args:
        output: directory of all runs.
        label: what a person should see first in the directory's name.
        facts: JSON values that decide the results; another value is another directory.
    """

    def __init__(self, output: str | Path, label: str, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.fingerprint = fingerprint(facts)
        self.directory = Path(output) / f"{label}-{self.fingerprint}"

    @classmethod
    def at(cls, directory: Path) -> Record:
        """A finished record.

        Raises:
            InputError: there is none, or it is damaged.
        """
        if not (directory / "results.json").is_file():
            raise InputError(f"{directory} is no finished run: it has no results.json.")
        record = cls(directory.parent, "", read_json(directory / "config.json"))
        record.directory = directory
        if "scored" not in record.results:
            raise InputError(f"{directory} has no scores: give the directory of a run that drew images.")
        return record

    @property
    def drawn(self) -> str:
        """Fingerprint of what decides each picture, whichever others there are."""
        data = {key: value for key, value in self.facts["data"].items() if key not in ("n", "seed", "reference")}
        return fingerprint({**self.facts, "data": data})

    @property
    def finished(self) -> bool:
        """Whether the results are there."""
        return (self.directory / "results.json").exists()

    @property
    def results(self) -> dict[str, Any]:
        """The finished run's results, as they lie there now.

        Raises:
            InputError: results.json is damaged.
        """
        path = self.directory / "results.json"
        results = read_json(path)
        if not is_whole(results):
            raise InputError(
                f"{path} is damaged (its digest is another): delete it and run again; images that are there are kept."
            )
        return results

    def start(self) -> None:
        """Make the directory and write its configuration.

        Raises:
            InputError: the directory cannot be written.
        """
        require_writable(self.directory / "images", "--model.output")
        write_json(self.directory / "config.json", self.facts)

    def adopt(self, file_names: Sequence[str]) -> int:
        """Take over pictures that another run beside this one drew in the very same way, as with another n.

        Args:
            file_names: of the real images, in drawn order.

        Returns:
            How many.
        """
        count = 0
        for config in sorted(self.directory.parent.glob("*/config.json")):
            try:
                other = Record(config.parent.parent, "", read_json(config))
                same = config.parent != self.directory and other.drawn == self.drawn
            except (InputError, KeyError, TypeError, AttributeError, ValueError):
                continue  # a damaged record is for `sdprune report` to name
            other.directory = config.parent
            for name in file_names if same else ():
                source, target = other.image_path(name), self.image_path(name)
                if target.exists() or not source.is_file():
                    continue
                with suppress(InputError):  # a damaged picture is drawn again
                    read_png(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(target) as temporary:
                        shutil.copyfile(source, temporary)
                    count += 1
        return count

    def tidy(self) -> None:
        """Remove what a killed attempt had begun to write. Only for the one run that makes the record."""
        for folder in ("images", "samples"):
            for path in (self.directory / folder).rglob(".*.*"):
                path.unlink(missing_ok=True)

    def image_path(self, file_name: str) -> Path:
        """Where the picture lies that was drawn for a real image's file."""
        return self.directory / "images" / drawn_name(file_name)

    def image_paths(self, batch: Batch) -> list[Path]:
        """Where the pictures of a batch lie, without those of fillers."""
        return [self.image_path(name) for name in batch.file_names[: batch.valid]]

    def sample_path(self, number: int) -> Path:
        """Where the picture of a sample prompt lies."""
        return self.directory / "samples" / f"{number}.png"

    def check(self, file_names: Sequence[str]) -> None:
        """Look at what an earlier attempt left.

        Args:
            file_names: of the real images, in drawn order.

        Raises:
            InputError: damaged results, rows or images, by name; of a finished run also images that are lost or are not
                those that were scored.
        """
        if self.finished:
            samples = self.results.get("samples") or ()
            kept = self.rows().get("images.digest")
            for number in range(len(samples)):
                read_png(self.sample_path(number))
            self._check_pictures([self.image_path(name) for name in file_names], [] if kept is None else kept.tolist())
            return
        for path in sorted((self.directory / "images").rglob("*.png")):
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, SyntaxError, UnidentifiedImageError) as error:
                raise damaged_image(path) from error

    def _check_pictures(self, paths: Sequence[Path], scored: Sequence[int]) -> None:
        found = FileDigests(str(self.directory.resolve())).of(paths)
        lost = [
            path
            for number, (path, digest) in enumerate(zip(paths, found, strict=True))
            if isinstance(digest, OSError) or short_digest(digest) != (scored[number] if number < len(scored) else None)
        ]
        if lost:
            raise InputError(
                f"{len(lost)} of {len(paths)} pictures of a finished run are missing or are not those that were "
                f"scored, such as {lost[0]}: delete {self.directory / 'results.json'} and those that are damaged, and "
                "run that record's command again; pictures that are whole are kept."
            )

    def save_rows(self, ids: Sequence[Any], rows: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Write the metrics' columns, [n, ...] in drawn order, beside the ids and the facts that decide each column.

        One file holds both, so that a run that is killed never leaves a column with the facts of another.
        """
        with replacing(self.directory / "rows.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, ids=np.asarray(ids), facts=np.asarray(json.dumps(facts, sort_keys=True)), **rows)  # type: ignore[arg-type]

    def save_captions(self, examples: Any, values: Mapping[str, Sequence[float]], keep: bool) -> None:
        """Write images.csv, for people: ids, files, captions, and each image's scores.

        Args:
            examples: the drawn rows.
            values: [n] by the name of the score.
            keep: whether scores that the file has and `values` has not stay in it.
        """
        import pandas as pd

        path = self.directory / "images.csv"
        table = pd.DataFrame({name: examples[name] for name in ("id", "file_name", "caption")})
        try:
            before = pd.read_csv(path) if keep else table
        except (OSError, ValueError):
            before = table
        scores = {**(dict(before.iloc[:, 3:]) if len(before) == len(table) else {}), **values}
        with replacing(path) as temporary:
            table.assign(**scores).to_csv(temporary, index=False, float_format="%.6g")

    def rows(self, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Columns of the metrics by key, [n, ...] in drawn order.

        Args:
            keys: which ones; those that are not there are left out. By default all, and `ids` and `facts` with them.

        Raises:
            InputError: rows.npz is missing or damaged.
        """
        path = self.directory / "rows.npz"
        try:
            with np.load(path, allow_pickle=False) as content:  # reading checks the sum of each column
                return {key: content[key] for key in (content.files if keys is None else keys) if key in content}
        except Exception as error:  # zipfile, zlib and NumPy each have their own
            raise InputError(
                f"{path} is missing or damaged: delete results.json beside it and run again; images are kept."
            ) from error

    def column_facts(self) -> dict[str, Any]:
        """By the key of a column, what decides its values beside the pictures; InputError as of `rows`."""
        return dict(json.loads(str(self.rows(["facts"]).get("facts", "{}"))))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the results with a digest of them all; the run is finished."""
        values = {name: value for name, value in results.items() if name != "digest"}
        write_json(self.directory / "results.json", {**values, "digest": _digest(values)})


def read_captions(directory: Path) -> pd.DataFrame:
    """Read images.csv of a run: ids, files and captions as text, and then the scores of each image.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    import pandas as pd

    table = pd.read_csv(directory / "images.csv", dtype=str, keep_default_na=False)  # a caption may be `None`
    if list(table.columns[:3]) != ["id", "file_name", "caption"]:
        raise ValueError(f"its columns are {', '.join(table.columns)}")
    scores = table.iloc[:, 3:].apply(pd.to_numeric, errors="coerce")
    return pd.concat([table.iloc[:, :3], scores], axis=1)


def is_whole(results: Mapping[str, Any]) -> bool:
    """Whether results that were read are those that were written."""
    return results.get("digest") == _digest({name: value for name, value in results.items() if name != "digest"})


def _digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, as they are after writing and reading."""
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
