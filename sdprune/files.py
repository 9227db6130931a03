"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdprune.errors import InputError


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
    except (OSError, ValueError, RecursionError) as error:
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
        try:
            if kind is None:
                self.temporary.chmod(0o644)
                os.replace(self.temporary, self.path)
        except IsADirectoryError as error:
            raise InputError(f"{self.path} is a directory where a file belongs: remove it and run again.") from error
        finally:
            self.temporary.unlink(missing_ok=True)
