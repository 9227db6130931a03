"""A run's directory, fingerprint and results: the only thing that studies read.

<output>/<label>-<fingerprint>/
    config.json      every fact that the fingerprint covers
    images/*.png     one image a prompt, under the name of its COCO image
    samples/*.png    the fixed prompts; grid.png shows them, the dense model's above
    rows.npz         `ids`, and for every image, in drawn order, what the metrics keep of it
    results.json     written last: a run that has it is finished
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sdprune.errors import InputError

COMPARED = ("version", "pipeline", "dtype", "data", "seed", "sampling", "metrics")
"""The facts that records which are compared have in common: all but what was pruned and how."""
_NOT_FINITE = "sdprune not finite"
_SECTIONS = {"n", "metrics", "comparison", "verdicts", "images", "sparsity", "pruning", "speed", "protocols"}
_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "datasets", "numpy")


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of SHA-256 over the canonical JSON of `facts`."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def image_seed(seed: int, image_id: object) -> int:
    """The noise seed of one image, in [0, 2^63): it depends on the run's seed and the image's id, on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big") >> 1


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    return {"sdprune": own_version(), **{name: version(name) for name in _PACKAGES}}


def own_version() -> str:
    """Version of the installed package."""
    try:
        return version("sdprune")
    except PackageNotFoundError:
        return "unknown"


def clock(seconds: float) -> str:
    """A time in seconds since 1970 for people: local, to the second, with the offset to UTC, as in ISO 8601."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def label(prune: Mapping[str, Any]) -> str:
    """`dense`, or what is pruned: `text_encoder-magnitude-0.475-unet-wanda-0.35`."""
    parts = []
    for name, spec in sorted(prune.items()):
        asked = f"{spec.sparsity:g}" if spec.band is None else "band-{:g}-{:g}".format(*spec.band)
        parts.append(f"{name}-{type(spec.criterion).__name__.lower()}-{asked}")
    return re.sub(r"[^\w.-]", "_", "-".join(parts))[:100] or "dense"


def require_comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """See that two records' facts differ in nothing but what was pruned and how.

    Raises:
        InputError: what differs, with both values: prompts, noise, sampling, model or how it was measured.
    """
    for name in COMPARED:
        if one.get(name) != other.get(name):
            key, own, others = next(_differences(name, one.get(name), other.get(name)))
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

    @property
    def finished(self) -> bool:
        """Whether the results are there."""
        return (self.directory / "results.json").exists()

    @cached_property
    def results(self) -> dict[str, Any]:
        """The finished run's results.

        Raises:
            InputError: results.json is damaged.
        """
        path = self.directory / "results.json"
        results = read_json(path)
        if "infeasible" not in results and (missing := _SECTIONS - set(results)):
            raise InputError(
                f"{path} is damaged (it has no {', '.join(sorted(missing))}): delete it and run again; images that are "
                "there are kept."
            )
        return results

    def start(self) -> None:
        """Make the directory and write its configuration.

        Raises:
            InputError: the directory cannot be written.
        """
        require_writable(self.directory / "images", "--model.output")
        write_json(self.directory / "config.json", self.facts)

    def tidy(self) -> None:
        """Remove what a killed attempt had begun to write. Only for the one run that makes the record."""
        for folder in ("images", "samples"):
            for path in (self.directory / folder).rglob(".*.*"):
                path.unlink(missing_ok=True)

    def image_path(self, file_name: str) -> Path:
        """Where the image of a COCO file lies."""
        return self.directory / "images" / Path(file_name).with_suffix(".png")

    def check(self) -> None:
        """Look at what an earlier attempt left.

        Raises:
            InputError: damaged results, rows or images, by name.
        """
        if self.finished:
            _ = self.results
            self.load_rows({"ids": "ids"}, whole=True)
            for number in range(len(self.facts.get("samples", ()))):
                read_png(self.directory / "samples" / f"{number}.png")
            return
        for path in sorted((self.directory / "images").rglob("*.png")):
            try:
                with Image.open(path) as image:
                    image.verify()
            except (OSError, SyntaxError, UnidentifiedImageError) as error:
                raise _damaged_image(path) from error

    def save_rows(self, ids: list[Any], rows: Mapping[str, np.ndarray]) -> None:
        """Write the metrics' rows, under their keys, beside the ids."""
        with replacing(self.directory / "rows.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, ids=np.asarray(ids), **rows)  # type: ignore[arg-type]

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
        """Write the results; the run is finished."""
        write_json(self.directory / "results.json", results)
        self.__dict__.pop("results", None)  # read before


def require_writable(directory: Path, option: str) -> None:
    """Make a directory and write to it.

    Raises:
        InputError: it cannot be written; `option` chooses another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"Cannot write {directory}: {error.strerror}. Choose another {option}.") from error


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


class Picture(NamedTuple):
    """A picture that was kept."""

    pixels: np.ndarray
    """uint8 [h, w, 3]."""
    finite: bool
    """Whether it came out of finite numbers."""


def read_png(path: Path) -> Picture:
    """Read a picture.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return Picture(np.array(image.convert("RGB")), _NOT_FINITE not in image.info)
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise _damaged_image(path) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: it is damaged.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("no object")
        return values
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete it and run again; images that are there are kept."
        ) from error


class replacing:  # noqa: N801 (reads as a verb: with replacing(path) as temporary)
    """A temporary path beside `path` that takes its place when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.temporary.chmod(0o644)
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
