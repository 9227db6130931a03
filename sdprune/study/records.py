"""Finished runs, read back: the only thing that tables and figures are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdprune.errors import InputError
from sdprune.identity import fingerprint
from sdprune.pruning import Budget, InfeasibleError, Size
from sdprune.record import COMPARED, read_json


class Difference(NamedTuple):
    """Pruned minus dense, with the ends of its 95 % interval where there is one."""

    value: float
    low: float | None
    high: float | None


class Pruned(NamedTuple):
    """How one component was pruned."""

    method: str
    """Such as `magnitude`, `owl_wanda` or `wanda by layer`; empty where it was left dense."""
    sparsity: float


DENSE = Pruned("", 0.0)


@dataclass(frozen=True)
class Run:
    """A finished record.

    Args:
        directory: where it lies.
        facts: what decided it.
        results: what came out.
    """

    directory: Path
    facts: dict[str, Any]
    results: dict[str, Any]

    @cached_property
    def text(self) -> Pruned:
        """How the text encoder was pruned."""
        return self._pruned(text=True)

    @cached_property
    def image(self) -> Pruned:
        """How the U-Net, or what stands in its place, was pruned."""
        return self._pruned(text=False)

    @property
    def key(self) -> tuple[Pruned, Pruned]:
        """Both."""
        return self.text, self.image

    @property
    def nominal(self) -> float:
        """The sparsity as the study counts."""
        return self.results["sparsity"]["nominal"]

    @property
    def zeros(self) -> float:
        """Zeros over all parameters of the prunable components."""
        return self.results["sparsity"]["prunable"]["zero_fraction"]

    def score(self, metric: str) -> float | None:
        """A metric's value, None where it was not measured."""
        return self.results["metrics"].get(metric)

    def difference(self, metric: str) -> Difference | None:
        """A metric's difference to the dense model, None for the dense one itself and where it was not measured."""
        found = [self.results["comparison"].get(f"{metric}_diff{end}") for end in ("", "_low", "_high")]
        return None if found[0] is None else Difference(*found)

    def clip_scores(self) -> np.ndarray | None:
        """The CLIP score of every image [n], None where it was not measured."""
        with np.load(self.directory / "rows.npz") as rows:
            names = [name for name in rows if name.endswith(".texts")]
            if not names:
                return None
            texts, images = rows[names[0]], rows[names[0].removesuffix(".texts") + ".features"]
        units = [part.astype(float) / np.linalg.norm(part, axis=1, keepdims=True) for part in (texts, images)]
        return (units[0] * units[1]).sum(1)

    def _pruned(self, text: bool) -> Pruned:
        for name, spec in self.facts["prune"].items():
            if name.startswith("text_encoder") == text:
                band = spec["band"]
                return Pruned(_method(spec), spec["sparsity"] if band is None else round(band[1] - band[0], 6))
        return DENSE


def _method(spec: dict[str, Any]) -> str:
    criterion, allocation = spec["criterion"]["class"], spec["allocation"]["class"]
    name = criterion.lower() if allocation == "Uniform" else f"{allocation.lower()}_{criterion.lower()}"
    own = {"Magnitude": "layer", "Wanda": "row", "SparseGPT": "column_block"}.get(criterion)
    parts = [name] if spec["granularity"] == own else [name, f"by {spec['granularity']}"]
    return " ".join([*parts, *(["band"] if spec["band"] else [])])


class Study:
    """Runs that may be compared with each other: the same prompts, noise, sampling and protocol.

    Args:
        runs: of one kind.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: (run.text, run.image, str(run.directory)))
        self.by_key = {run.key: run for run in reversed(self.runs)}

    @property
    def dense(self) -> Run | None:
        """The run without pruning."""
        return self.by_key.get((DENSE, DENSE))

    def find(self, text: Pruned, image: Pruned) -> Run | None:
        """The run that was pruned so."""
        return self.by_key.get((text if text.sparsity else DENSE, image if image.sparsity else DENSE))

    def alone(self, text: bool) -> dict[str, list[Run]]:
        """By method, the runs that pruned one component alone, by sparsity."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            own, other = run.key if text else run.key[::-1]
            if own.sparsity and other == DENSE:
                found.setdefault(own.method, []).append(run)
        return found

    @property
    def sizes(self) -> dict[str, Size]:
        """Of the prunable components, as the first run counted."""
        sparsity = self.runs[0].results["sparsity"]["components"]
        names = [name for name in sparsity if name.startswith("text_encoder")]
        names += [name for name in sparsity if name in ("unet", "transformer")]
        return {name: Size(sparsity[name]["parameters"], 0) for name in names}

    @property
    def is_sd2(self) -> bool:
        """Whether the model is of Stable Diffusion 2's size, so that published values may stand beside."""
        return {size.parameters for size in self.sizes.values()} == {340_387_840, 865_910_724}

    def split(self, total: float, text_share: float) -> tuple[float, float] | None:
        """The sparsities of text encoder and U-Net by the study's Table 1; None where infeasible."""
        text = [name for name in self.sizes if name.startswith("text_encoder")]
        try:
            found = Budget(total, text_share).sparsities(self.sizes, text)
        except InfeasibleError:
            return None
        return found[text[0]], next(value for name, value in found.items() if name not in text)

    @property
    def title(self) -> str:
        """One line on what all runs share."""
        facts = self.runs[0].facts
        sampling, data = facts["sampling"], facts["data"]
        model = facts["pipeline"].get("model") or "a local model"
        networks = sorted({p["protocol"] for p in self.runs[0].results["protocols"].values() if "protocol" in p})
        return (
            f"{model}, {data['n']} prompts, {sampling['steps']} steps, guidance {sampling['guidance']:g}, seed "
            f"{facts['seed']}, {', '.join(networks)}"
        )


def read(directories: Iterable[str | Path]) -> tuple[list[Study], list[dict[str, Any]]]:
    """(The studies below these directories, largest first; what their infeasible records say).

    Raises:
        InputError: a directory that is not there, a damaged record, or no finished record at all.
    """
    groups: dict[str, list[Run]] = {}
    infeasible = []
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise InputError(f"No directory {str(directory)!r}: give one that `sdprune predict` wrote runs to.")
        for path in sorted(directory.glob("**/results.json")):
            results = read_json(path)
            facts = read_json(path.parent / "config.json")
            if "infeasible" in results:
                infeasible.append(results)
            elif "data" in facts and "protocols" in results:
                kind = fingerprint({name: facts[name] for name in COMPARED})
                groups.setdefault(kind, []).append(Run(path.parent, facts, results))
    if not groups:
        raise InputError(
            f"No finished run below {', '.join(map(str, directories))}: run sdprune predict or sweep first."
        )
    return sorted(map(Study, groups.values()), key=lambda study: -len(study.runs)), infeasible
