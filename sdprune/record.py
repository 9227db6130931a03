"""A run's directory, fingerprint and results: the only thing that studies read.

<output>/<label>-<fingerprint>/
    config.json      every fact that the fingerprint covers
    images/*.png     one image a prompt, under the name of its COCO image
    samples/*.png    the fixed prompts; grid.png shows them, the dense model's above
    rows.npz         `ids`, and for every image, in drawn order, what the metrics keep of it
    results.json     written last: a run that has it is finished
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sdprune.data.sources import drawn_name
from sdprune.errors import InputError
from sdprune.files import read_json, replacing, require_writable, write_json
from sdprune.identity import FileDigests, fingerprint, own_version

COMPARED = ("version", "pipeline", "dtype", "data", "seed", "sampling")
"""The facts that records which are compared have in common: all but what was pruned and how."""
_LABEL = 79  # characters: with "pruned-" before and "-<fingerprint>" behind, 99
_NOT_FINITE = "sdprune not finite"
_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "datasets", "numpy")


def image_seed(seed: int, image_id: object) -> int:
    """The noise seed of one image, in [0, 2^63): it depends on the run's seed and the image's id, on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big") >> 1


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    return {"sdprune": own_version(), **{name: version(name) for name in _PACKAGES}}


def clock(seconds: float) -> str:
    """A time in seconds since 1970 for people: local, to the second, with the offset to UTC, as in ISO 8601."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def label(prune: Mapping[str, Any], unpruned: str = "dense") -> str:
    """What is pruned and how: `text_encoder-magnitude-layer-0.475-unet-owl-m5-wanda-row-0.35-original`.

    Options of a criterion or an allocation, order, timesteps, blocks and mode stand there where they are not the
    default; at the end those that all components share. A name of this and the fingerprint has less than 100
    characters: a label that is too long goes without those granularities that are their criterion's default, and then
    without these options too. Where nothing is pruned it is `unpruned`.
    """
    if not prune:
        return re.sub(r"[^\w.-]", "_", unpruned, flags=re.ASCII)[-_LABEL:]
    settings = [_settings(spec) for spec in prune.values()]
    shared = settings[0] if settings and all(one == settings[0] for one in settings) else []
    for granularity, options in ((True, True), (False, True), (False, False)):
        parts = []
        for component, spec in sorted(prune.items()):
            parts += [component, *_pruned(spec, granularity, options)]
            parts += _settings(spec) if options and not shared else []
        name = "-".join(parts + (shared if options else []))
        name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
        if len(name) <= _LABEL:
            break
    return name[:_LABEL]


def _pruned(spec: Any, granularity: bool, options: bool) -> list[str]:
    parts = _named(spec.allocation, options) if type(spec.allocation).__name__ != "Uniform" else []
    parts += _named(spec.criterion, options)
    if granularity or spec.granularity != spec.criterion.granularities[0]:
        parts.append(str(spec.granularity))
    if spec.band is not None:
        parts.append("band-{:g}-{:g}".format(*spec.band))
    elif spec.sparsity and not spec.pattern:  # else a pattern or the allocation says how much
        parts.append(f"{spec.sparsity:g}")
    return parts


def _named(part: Any, options: bool) -> list[str]:
    """The name of a criterion or an allocation, and its numbers that are not the default."""
    name = type(part).__name__.lower()
    changed = [
        f"{key.strip('_')}{value:g}"
        for key, one in signature(type(part)).parameters.items()
        if isinstance(value := getattr(part, key, None), (int, float)) and value != one.default
    ]
    return [name, *changed] if options else [name]


def _settings(spec: Any) -> list[str]:
    """The choices of how statistics are gathered and weights are counted that are not the default."""
    chosen = spec.describe()  # None where a choice has no effect
    names = ("order", "timesteps", "blocks", "mode")
    return [chosen[name] for name in names if chosen[name] not in (getattr(type(spec), name), None)]


def protocol(results: Mapping[str, Any]) -> dict[str, Any]:
    """How each score of finished results was measured, whatever it was compared with."""
    return {
        name: {key: value for key, value in facts.items() if key != "baseline"}
        for name, facts in results.get("scored", {}).items()
    }


def require_comparable(one: Record, other: Record, same_model: bool = True, scores: Iterable[str] = ()) -> None:
    """See that two records differ in nothing but what was pruned and how.

    Args:
        one: a record.
        other: what it is compared with.
        same_model: whether both have to be of one model.
        scores: names of those that are compared; both records are finished then.

    Raises:
        InputError: what differs, with both values: prompts, noise, sampling, model or how it was measured.
    """
    names = list(scores)
    ours, theirs = (protocol(record.results) if names else {} for record in (one, other))
    pairs = [
        (name, one.facts.get(name), other.facts.get(name)) for name in COMPARED if same_model or name != "pipeline"
    ]
    pairs += [(f"scored.{name}", ours.get(name), theirs.get(name)) for name in names]
    for name, mine, its in pairs:
        if mine != its:
            key, own, others = next(_differences(name, mine, its))
            raise InputError(
                f"These records cannot be compared: {key} is {own!r} in one and {others!r} in the other. Draw both "
                "from the same prompts and noise, and measure both by the same protocol."
            )


def _differences(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, by dotted name."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from _differences(f"{name}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{name}.{number}", a, b)
    elif one != other:
        yield name, one, other


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
                if source.is_file() and not target.exists() and _is_picture(source):
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
            kept = self.load_rows({"digest": "images.digest"}, whole=True).get("digest")
            for number in range(len(samples)):
                read_png(self.sample_path(number))
            self._check_pictures([self.image_path(name) for name in file_names], [] if kept is None else kept.tolist())
            return
        for path in sorted((self.directory / "images").rglob("*.png")):
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, SyntaxError, UnidentifiedImageError) as error:
                raise _damaged_image(path) from error

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

    def save_rows(self, ids: list[Any], rows: Mapping[str, np.ndarray]) -> None:
        """Write the metrics' rows, under their keys, beside the ids."""
        with replacing(self.directory / "rows.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, ids=np.asarray(ids), **rows)  # type: ignore[arg-type]

    def save_captions(self, examples: Any, values: Mapping[str, Sequence[float]]) -> None:
        """Write images.csv, for people: ids, files, captions, and each image's scores."""
        with replacing(self.directory / "images.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "file_name", "caption", *values])
            columns = (examples["id"], examples["file_name"], examples["caption"])
            for row in zip(*columns, *values.values(), strict=True):
                writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])

    def all_rows(self) -> dict[str, np.ndarray]:
        """All rows by key, those of the files of the images left out where they are not there.

        Raises:
            InputError: rows.npz is missing or damaged.
        """
        names = self.load_rows({"ids": "ids"}, whole=True)
        with np.load(self.directory / "rows.npz", allow_pickle=False) as content:
            return {key: content[key] for key in content.files if key not in names}

    def load_rows(self, keys: Mapping[str, str], whole: bool = False) -> dict[str, np.ndarray]:
        """Rows of one metric.

        Args:
            keys: by column, under which key it was kept; those that are not there are left out.
            whole: look for damage in all other rows too.

        Raises:
            InputError: rows.npz is missing or damaged.
        """
        path = self.directory / "rows.npz"
        try:
            with np.load(path, allow_pickle=False) as content:
                if whole and content.zip.testzip() is not None:
                    raise ValueError("checksum")
                return {column: content[key] for column, key in keys.items() if key in content}
        except Exception as error:  # zipfile, zlib and NumPy each have their own
            raise InputError(
                f"{path} is missing or damaged: delete results.json beside it and run again; images are kept."
            ) from error

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the results with a digest of them all; the run is finished."""
        values = {name: value for name, value in results.items() if name != "digest"}
        write_json(self.directory / "results.json", {**values, "digest": _digest(values)})


def is_whole(results: Mapping[str, Any]) -> bool:
    """Whether results that were read are those that were written."""
    return results.get("digest") == _digest({name: value for name, value in results.items() if name != "digest"})


def _digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, as they are after writing and reading."""
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _damaged_image(path: Path) -> InputError:
    results = next((one / "results.json" for one in path.parents if (one / "results.json").exists()), None)
    if results is not None:
        told = f"delete it and {results}, and run that record's command again; images that are whole are kept."
    elif path.parent.name == "samples":
        told = "run again; images that are there are kept."
    else:
        told = "delete it and run again; images that are whole are kept."
    return InputError(f"{path} is missing or damaged: {told}")


def save_png(path: Path, pixels: np.ndarray, finite: bool = True) -> None:
    """Write uint8 [h, w, 3] atomically; whether it came out of finite numbers goes into the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = PngInfo()
    if not finite:
        note.add_text(_NOT_FINITE, "true")
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=note)


def _is_picture(path: Path) -> bool:
    try:
        return bool(read_png(path))
    except InputError:
        return False


class Picture(NamedTuple):
    """A picture that was kept."""

    pixels: np.ndarray
    """uint8 [h, w, 3]."""
    finite: bool
    """Whether it came out of finite numbers."""
    digest: int
    """Of the file, see `short_digest`."""


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
        raise _damaged_image(path) from error
