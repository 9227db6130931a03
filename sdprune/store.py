"""Statistics of layer inputs, each gathered once and kept under a fingerprint of what it depends on.

<root>/<component>-<statistic>-<fingerprint>/
    000.safetensors, ...   layers, one file a pass over the calibration batches
    facts.json             written last: statistics that have it are whole
<root>/progress-<fingerprint>.safetensors   the sums of a pass that was interrupted
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.errors import InputError
from sdprune.record import fingerprint, replacing, require_writable, write_json

if TYPE_CHECKING:
    from torch import Tensor

Facts = Mapping[str, Any]


class StatisticsStore:
    """A directory of statistics.

    Args:
        root: the directory; made when the first statistics are saved.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, facts: Facts) -> Path:
        """The directory of the statistics that `facts` decide."""
        return self.root / f"{facts['component']}-{facts['statistic']}-{fingerprint(facts)}"

    def __contains__(self, facts: Facts) -> bool:
        return (self.path(facts) / "facts.json").exists()

    def load(self, facts: Facts) -> Layers:
        """What has been gathered, whole or in part, by layer; values are read when they are asked for.

        Raises:
            InputError: a file is damaged.
        """
        return Layers(sorted(self.path(facts).glob("*.safetensors")))

    def check(self, facts: Iterable[Facts]) -> None:
        """See that what is there can be read, and that the rest can be written.

        Raises:
            InputError: a damaged file, or a directory that cannot be written.
        """
        for fact in facts:
            self.load(fact)
            if fact not in self:
                require_writable(self.root, "--model.store")

    def add(self, facts: Facts, number: int, layers: Mapping[str, Tensor]) -> None:
        """Write the layers of one pass."""
        path = self.path(facts)
        path.mkdir(parents=True, exist_ok=True)
        _write(path / f"{number:03d}.safetensors", layers)

    def finish(self, facts: Facts) -> None:
        """The statistics are whole."""
        write_json(self.path(facts) / "facts.json", facts)

    def progress(self, facts: Facts) -> Progress:
        """Where an unfinished pass keeps its sums."""
        return Progress(self.root / f"progress-{fingerprint(facts)}.safetensors")


class Layers(Mapping[str, "Tensor"]):
    """Tensors by layer, read from files one at a time; the last one is kept.

    Raises:
        InputError: a file is damaged.
    """

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


class Progress:
    """The sums of a pass over its first batches, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[int, int, dict[str, Tensor]] | None:
        """(batches, samples, sums by `<statistic>/<layer>`); None if there are none, or the file is damaged."""
        from safetensors.torch import load_file

        try:
            with _opened(self.path) as content:
                told = json.loads(content.metadata()["progress"])
            return told["batches"], told["samples"], load_file(self.path)
        except (InputError, KeyError, TypeError, ValueError):
            return None  # begins again: nothing is lost but time

    def save(self, batches: int, samples: int, sums: Mapping[str, Tensor]) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, sums, {"progress": json.dumps({"batches": batches, "samples": samples})})

    def delete(self) -> None:
        """The pass is done."""
        self.path.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, temporary, metadata)


class _opened:  # noqa: N801 (reads as a verb)
    """A safetensors file; whatever is wrong with it is told as InputError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self.content = safe_open(self.path, framework="pt")
            return self.content.__enter__()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} is damaged ({error}): delete it, and it is gathered again.") from error

    def __exit__(self, *error: Any) -> None:
        self.content.__exit__(*error)
