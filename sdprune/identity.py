"""What results depend on beside options: the code that makes them, and the contents of files."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdprune.errors import InputError

_PACKAGE = Path(__file__).parent
DRAWING = ("pruning", "calibration", "pipelines", "data", "mini", "modules")
"""Folders of the package whose code decides statistics, masks and pictures."""
SCORING = ("metrics",)
"""Those that decide scores; command line, reports and progress decide no numbers."""
_LIBRARIES = ("sdprune", "builtins", "abc", "typing", "torch", "torchmetrics", "lightning", "transformers", "diffusers")


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of SHA-256 over the canonical JSON of `facts`."""
    try:
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InputError(f"An option of this run is no finite number ({error}): give one.") from error
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def own_version() -> str:
    """Version of the installed package."""
    try:
        return version("sdprune")
    except PackageNotFoundError:
        return "unknown"


@cache
def package_code(*folders: str) -> str:
    """Version of this package with a digest of its source, as in `0.1.0+3f2a...`: what identities hold.

    Args:
        folders: whose code counts; by default all that decide numbers.
    """
    digest = hashlib.sha256()
    for path in sorted(
        path for folder in folders or (*DRAWING, *SCORING) for path in (_PACKAGE / folder).rglob("*.py")
    ):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{own_version()}+{digest.hexdigest()[:12]}"


def code_of(part: object) -> dict[str, str]:
    """The source of a user's own class, for identities: {"code": digest}; empty for classes of this package.

    The digest covers the files that define the class and its bases, but no other files that these import.
    """
    own = [cls for cls in type(part).__mro__ if cls.__module__.partition(".")[0] not in _LIBRARIES]
    if not own:
        return {}
    digest = hashlib.sha256()
    for cls in own:
        digest.update(f"{cls.__module__}.{cls.__qualname__}\0{_source(cls)}\0".encode())
    return {"code": digest.hexdigest()[:12]}


def facts_of(part: Any) -> dict[str, Any]:
    """What `part.describe()` gives, with the code of a user's own class."""
    return {**part.describe(), **code_of(part)}


def _source(cls: type) -> str:
    """Source of the file that holds a class, or what there is of it for one that was typed in."""
    try:
        return Path(inspect.getsourcefile(cls) or "").read_text(encoding="utf-8")
    except (OSError, TypeError):
        pass
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


class FileDigests:
    """SHA-256 of files, remembered with what the file system says of them: an unchanged file is read once.

    Args:
        name: of the set of files; it decides where digests are remembered, below $SDPRUNE_CACHE or ~/.cache/sdprune.
            Where that cannot be written nothing is remembered.
    """

    def __init__(self, name: str) -> None:
        home = os.environ.get("SDPRUNE_CACHE") or Path.home() / ".cache" / "sdprune"
        self.path = Path(home) / f"digests-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"

    def of(self, paths: Iterable[Path]) -> list[str | OSError]:
        """The digest of each file, in order; the error for one that cannot be read."""
        known = self._load()
        paths = list(paths)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(lambda path: _digest(path, known.get(str(path))), paths))
        current = {str(path): entry for path, entry in zip(paths, found, strict=True) if not isinstance(entry, OSError)}
        if any(known.get(path) != entry for path, entry in current.items()):
            self._save(known | current)
        return [entry if isinstance(entry, OSError) else entry[-1] for entry in found]

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _save(self, known: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=".digests", delete=False) as file:
                json.dump(known, file)
            os.replace(file.name, self.path)
        except OSError:
            return


def _digest(path: Path, known: Any) -> list[Any] | OSError:
    """[inode, size, time of modification, time of change, SHA-256]; nobody can set the time of change."""
    try:
        state = path.stat()
        entry = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if isinstance(known, list) and known[:-1] == entry:
            return known
        with path.open("rb") as file:
            return [*entry, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        return error
