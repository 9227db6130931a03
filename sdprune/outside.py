"""Files from outside are data: nothing in them is run, and what is wrong with them is one InputError."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from zipfile import ZipFile

from sdprune.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

REPLACE = "Replace it with an intact copy."
"""The next step where a file or a directory is damaged."""
_PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS: Pillow runs Ghostscript for it
_LARGEST = 2**20  # of the numbers in a model's configuration; sizes beyond are damage that would exhaust memory
_MOST_LAYERS = 1_000
_DEEPEST = 64
_UNPACKED = 2**26
_RATIO = 100


@contextmanager
def reading(problem: str, then: str = REPLACE) -> Iterator[None]:
    """Raise InputError for whatever a library raises on data that it cannot use.

    Only reading belongs in here: whatever goes wrong is blamed on the data.

    Args:
        problem: a clause that names the data, such as `config.json is damaged`.
        then: the next step; empty where the caller tells it.

    Raises:
        InputError: `<problem> (<reason>). <then>`.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not _blames_data(error):
            raise
        raise InputError(f"{problem} ({reason(error)}). {then}".rstrip()) from error


def _blames_data(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return False
    # Rust libraries (tokenizers) raise their panics beside Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200].rstrip(". ")
    named = isinstance(error, (OSError, ValueError)) and text
    return text if named else f"{type(error).__name__}: {text}".rstrip(": ")


def read_json(path: Path, then: str = REPLACE, infinite: bool = False) -> Any:
    """Read strict JSON: no NaN, no Infinity.

    Args:
        path: the file.
        then: the next step where it is damaged.
        infinite: whether Infinity may be in it all the same, as in configurations of schedulers.

    Raises:
        InputError: the file is missing, damaged, or nested too deeply.
    """

    def constant(name: str) -> float:
        if infinite and name.endswith("Infinity"):
            return float(name)
        raise ValueError(f"{name} is no JSON")

    with reading(f"{path} is damaged", then):
        values = json.loads(path.read_bytes(), parse_constant=constant)
        _refuse_depth(values)
        return values


def _refuse_depth(values: Any) -> None:
    """Refuse what libraries that follow a configuration by recursion cannot follow."""
    level = [values]
    for _ in range(_DEEPEST):
        inner = [
            tuple(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))
        ]
        level = [value for one in inner for value in one]
        if not level:
            return
    raise ValueError(f"nested more than {_DEEPEST} levels deep")


def read_config(path: Path, infinite: bool = False) -> dict[str, Any]:
    """Read a JSON object of a model's options.

    Args:
        path: the file.
        infinite: whether Infinity may be in it.

    Raises:
        InputError: it is damaged, or has numbers that no model has.
    """
    values = read_json(path, infinite=infinite)
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: expected an object of options. {REPLACE}")
    for key, number in _numbers(values):
        most = _MOST_LAYERS if "layers" in key else _LARGEST
        if isinstance(number, int) and abs(number) > most:
            raise InputError(f"{path} is damaged: {key} is {number}, and at most {most} is possible. {REPLACE}")
    return values


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers of a JSON value, each with the nearest key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, name)
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield key, values


def read_picture(file: str | Path | BinaryIO) -> Image:
    """Read a picture in RGB; the first frame where there are several.

    Raises:
        Exception: whatever Pillow raises, also for pictures of so many pixels (89 million) that they are likely made to
            exhaust memory; call it inside `reading`.
    """
    from PIL import Image

    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with Image.open(file, formats=_PICTURES) as image:
        return image.convert("RGB")


def read_npz(path: Path, then: str = "Give an npz file with the keys mu and sigma.") -> dict[str, np.ndarray]:
    """Read all arrays of an npz file; no pickles, and nothing that unpacks to far more than the file.

    Raises:
        InputError: the file is missing, damaged, holds pickles, or is a zip bomb.
    """
    import numpy as np

    with reading(f"{path} is not a readable npz file", then):
        with ZipFile(path) as archive:
            _refuse_bomb(archive, path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}


def _refuse_bomb(archive: ZipFile, size: int) -> None:
    unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > max(_UNPACKED, _RATIO * size):
        raise ValueError(f"{size:,} bytes unpack to {unpacked:,}")
