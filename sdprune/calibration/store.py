"""Statistics of layer inputs, each gathered once and kept under a fingerprint of what it depends on.

<root>/<component>-<statistic>-<fingerprint>/
    *.safetensors   layers, one file a pass over the calibration batches, each with a digest of its contents
    facts.json      written last, with the names of the files: statistics that have it and them are whole
<root>/progress-<fingerprint>.safetensors   the sums of a pass that was interrupted
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdprune.files import replacing, require_writable, write_json
from sdprune.identity import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

Facts = Mapping[str, Any]


class Store(Protocol):
    """Where statistics are kept."""

    @property
    def root(self) -> Path | None:
        """The directory, if it is one."""

    def __contains__(self, facts: Facts) -> bool:
        """Whether the statistics that `facts` decide are there, all of them."""

    def load(self, facts: Facts) -> Mapping[str, Tensor]:
        """What has been gathered, in whole or in part, by layer."""

    def add(self, facts: Facts, layers: Mapping[str, Tensor]) -> None:
        """Keep the layers of one pass."""

    def finish(self, facts: Facts) -> None:
        """The statistics are whole."""

    def progress(self, facts: Facts) -> Progress | NoProgress:
        """Where an unfinished pass keeps its sums."""


class MemoryStore:
    """Keeps statistics for as long as it lives, and never has all of them."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self._layers: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, facts: Facts) -> bool:
        return False

    def load(self, facts: Facts) -> Mapping[str, Tensor]:  # noqa: D102
        return self._layers.setdefault(fingerprint(facts), {})

    def add(self, facts: Facts, layers: Mapping[str, Tensor]) -> None:  # noqa: D102
        self._layers.setdefault(fingerprint(facts), {}).update(layers)

    def finish(self, facts: Facts) -> None:  # noqa: D102
        pass

    def progress(self, facts: Facts) -> NoProgress:  # noqa: D102
        return NoProgress()


class StatisticsStore:
    """A directory of statistics. A file that is missing or damaged counts as not gathered.

    Args:
        root: the directory; made when the first statistics are saved.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, facts: Facts) -> Path:
        """The directory of the statistics that `facts` decide."""
        return self.root / f"{facts['component']}-{facts['statistic']}-{fingerprint(facts)}"

    def __contains__(self, facts: Facts) -> bool:
        try:
            files = json.loads((self.path(facts) / "facts.json").read_text())["files"]
            return isinstance(files, list) and all(_is_whole(self.path(facts) / str(name)) for name in files)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def load(self, facts: Facts) -> Layers:
        """What has been gathered, in whole or in part, by layer; values are read lazily."""
        return Layers(path for path in self._files(facts) if _is_whole(path))

    def damaged(self, facts: Facts) -> list[Path]:
        """Files that are there, but not as they were written: they are gathered again."""
        return [path for path in self._files(facts) if not _is_whole(path)]

    def check(self, facts: Iterable[Facts]) -> None:
        """See that what has to be gathered can be written.

        Raises:
            InputError: a directory that cannot be written.
        """
        if any(fact not in self for fact in facts):
            require_writable(self.root, "--model.store")

    def add(self, facts: Facts, layers: Mapping[str, Tensor]) -> None:
        """Write the layers of one pass, in a file that is named after them: other passes than an interrupted run made,
        as with more memory, lose nothing of it."""
        path = self.path(facts)
        path.mkdir(parents=True, exist_ok=True)
        _write(path / f"{fingerprint({'layers': sorted(layers)})}.safetensors", layers)

    def finish(self, facts: Facts) -> None:
        """The statistics are whole."""
        whole = [path.name for path in self._files(facts) if _is_whole(path)]
        write_json(self.path(facts) / "facts.json", {**facts, "files": whole})

    def progress(self, facts: Facts) -> Progress:
        """Where an unfinished pass keeps its sums."""
        return Progress(self.root / f"progress-{fingerprint(facts)}.safetensors")

    def _files(self, facts: Facts) -> list[Path]:
        return sorted(self.path(facts).glob("*.safetensors"))


class Layers(Mapping[str, "Tensor"]):
    """Tensors by layer, read from whole files one at a time; the last one is kept."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._last: tuple[str, Tensor] | None = None
        for file in files:
            with _opened(file) as content:
                self._files |= dict.fromkeys(content.keys(), file)

    def __getitem__(self, layer: str) -> Tensor:
        if self._last is None or self._last[0] != layer:
            self._last = None  # before the next one is read
            with _opened(self._files[layer]) as content:
                self._last = (layer, content.get_tensor(layer))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class NoProgress:
    """Keeps nothing: a pass that is interrupted begins again."""

    def load(self) -> None:  # noqa: D102
        return None

    def save(self, batches: int, samples: int, sums: Mapping[str, Tensor]) -> None:  # noqa: D102
        pass

    def delete(self) -> None:  # noqa: D102
        pass


class Progress:
    """The sums of a pass over its first batches, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[int, int, dict[str, Tensor]] | None:
        """(batches, samples, sums by `<statistic>/<layer>`); None if there are none, or the file is damaged."""
        from safetensors.torch import load_file

        if not _is_whole(self.path):
            return None  # begins again: nothing is lost but time
        with _opened(self.path) as content:
            counts = json.loads(content.metadata()["progress"])
        return counts["batches"], counts["samples"], load_file(self.path)

    def save(self, batches: int, samples: int, sums: Mapping[str, Tensor]) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, sums, {"progress": json.dumps({"batches": batches, "samples": samples})})

    def delete(self) -> None:
        """The pass is done."""
        self.path.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors with a digest of them all: the format itself has no checksum."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: value.contiguous().cpu() for name, value in tensors.items()}
    metadata = dict(metadata or {})
    with replacing(path) as temporary:
        try:
            save_file(content, temporary, metadata | {"digest": _digest(content, metadata)})
        except SafetensorError as error:  # has the system's error in its text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether a file is there and holds what was written; a file that did not change is read once."""
    try:
        state = path.stat()
    except OSError:
        return False
    return _verified(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=4096)
def _verified(path: Path, *state: int) -> bool:
    from safetensors import SafetensorError

    try:
        with _opened(path) as content:
            metadata = dict(content.metadata() or {})
            written = metadata.pop("digest", None)
            return written == _digest(_OneByOne(content), metadata)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError):
        return False


class _OneByOne(Mapping[str, "Tensor"]):
    """The tensors of an open file, read lazily."""

    def __init__(self, content: Any) -> None:
        self.content, self.names = content, list(content.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.content.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")
