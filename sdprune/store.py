"""Statistics of dense models, each gathered once and kept under a fingerprint of what it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdprune.errors import InputError
from sdprune.record import fingerprint, replacing, require_writable, write_json

if TYPE_CHECKING:
    from torch import Tensor


class StatisticsStore:
    """A directory of safetensors files.

    Args:
        root: the directory; made when the first statistics are saved.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, facts: Mapping[str, Any]) -> Path:
        """The file of the statistics that `facts` decide."""
        return self.root / f"{facts['component']}-{fingerprint(facts)}.safetensors"

    def __contains__(self, facts: Mapping[str, Any]) -> bool:
        return self.path(facts).exists()

    def load(self, facts: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Statistics by name, then by layer.

        Raises:
            InputError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(facts)
        try:
            flat = load_file(path)
            statistics: dict[str, dict[str, Tensor]] = {}
            for key, value in flat.items():
                statistic, layer = key.split("/", 1)
                statistics.setdefault(statistic, {})[layer] = value
            return statistics
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it, and it is gathered again.") from error

    def check(self, facts: Iterable[Mapping[str, Any]]) -> None:
        """Read what is there, and see that the rest can be written.

        Raises:
            InputError: a damaged file, or a directory that cannot be written.
        """
        for fact in facts:
            if fact in self:
                self.load(fact)
            else:
                require_writable(self.root, "--model.store")

    def save(self, facts: Mapping[str, Any], statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the statistics and, beside them, the facts."""
        from safetensors.torch import save_file

        self.root.mkdir(parents=True, exist_ok=True)
        flat = {f"{name}/{layer}": value for name, layers in statistics.items() for layer, value in layers.items()}
        path = self.path(facts)
        with replacing(path) as temporary:
            save_file({key: value.contiguous().cpu() for key, value in flat.items()}, temporary)
        write_json(path.with_suffix(".json"), facts)
