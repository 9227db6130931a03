"""Finished runs, read back: the only thing that tables and figures are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdprune.study.values import Value, printable


class Difference(NamedTuple):
    """Pruned minus dense, with the ends of its 95 % interval where there is one."""

    value: float
    low: float | None
    high: float | None


class Pruned(NamedTuple):
    """How one component was pruned, as far as the study's tables tell methods apart."""

    method: str
    """Such as `magnitude`, `owl_wanda` or `wanda by layer`; empty where it was left dense."""
    sparsity: float


DENSE = Pruned("", 0.0)


@dataclass(frozen=True)
class Component:
    """The pruning of the text encoders, or of what stands beside them: the U-Net.

    Args:
        pruned: the method and the sparsity.
        choices: all other choices that decide the masks, calibration included, as words by name.
        original: whether weights were counted as in the published code.
    """

    pruned: Pruned = DENSE
    choices: Mapping[str, str] = field(default_factory=dict)
    original: bool = True


@dataclass(frozen=True)
class Run:
    """A finished record whose every part has been checked.

    Args:
        directory: where it lies.
        identity: everything that decided its masks; equal for equal prunings only.
        shared: the facts that runs must have in common to be compared.
        protocols: how each score was measured.
        title: one line on them.
        text: the text encoders' pruning.
        image: that of the U-Net, or what stands in its place.
        samples: the prompts of samples/0.png, samples/1.png and so on.
        n: images.
        nominal: the sparsity as the study counts.
        zeros: shares of weights that are zero, over `targets`, `prunable` and `pipeline`.
        sizes: parameters by prunable component.
        text_encoders: which of these are text encoders.
        metrics: scores.
        comparison: differences to the dense run, with the ends of their intervals.
        images: how many are `black`, `not_finite` and `invalid`.
        clip_scores: of every image [n]; None where the CLIP score was not measured.
        notes: what is missing from it.
    """

    directory: Path
    identity: str
    shared: Mapping[str, Any]
    protocols: Mapping[str, Any]
    title: str
    text: Component
    image: Component
    samples: tuple[str, ...]
    n: int
    nominal: float
    zeros: Mapping[str, float]
    sizes: Mapping[str, int]
    text_encoders: tuple[str, ...]
    metrics: Mapping[str, float]
    comparison: Mapping[str, float]
    images: Mapping[str, int]
    clip_scores: np.ndarray | None
    notes: tuple[str, ...] = ()

    @cached_property
    def name(self) -> str:
        """Of the directory."""
        return printable(self.directory.name)

    @property
    def key(self) -> tuple[Pruned, Pruned]:
        """How both components were pruned."""
        return self.text.pruned, self.image.pruned

    @property
    def original(self) -> bool:
        """Whether every component was counted as in the published code."""
        return self.text.original and self.image.original

    def component(self, text: bool) -> Component:
        """One of the two."""
        return self.text if text else self.image

    def difference(self, metric: str) -> Difference | None:
        """A metric's difference to the dense model, None for the dense one itself and where it was not measured."""
        value = self.comparison.get(f"{metric}_diff")
        ends = [self.comparison.get(f"{metric}_diff_{end}") for end in ("low", "high")]
        return None if value is None else Difference(value, *ends)


def component(prune: Value, calibration: Value, pruning: Value | None, names: Collection[str]) -> Component:
    """Read the pruning of one of the two kinds of component.

    Args:
        prune: config.json's, by component.
        calibration: config.json's, what each statistic depends on.
        pruning: results.json's counts, by component.
        names: of the components of this kind.
    """
    specs = {name: spec for name, spec in prune.items() if name in names}
    if not specs:
        return Component()
    first, *others = specs
    choices = _choices(specs[first])
    for name in others:  # they usually are pruned alike
        more = {f"{name} {key}": value for key, value in _choices(specs[name]).items() if value != choices.get(key)}
        if _amount(specs[name], name, pruning) != _amount(specs[first], first, pruning):
            more[f"{name} sparsity"] = f"{_amount(specs[name], name, pruning):g}"
        choices |= more
    for need in calibration.elements():
        if need["component"].text() in specs:
            skipped = ("component", "statistic", "layers", "version", "pipeline", "dtype", "prune", "allocation")
            choices |= _words(need.mapping(), "calibration", skipped)
    pruned = Pruned(_method(specs[first]), _amount(specs[first], first, pruning))
    return Component(pruned, choices, all(spec.get("mode", "exact") == "original" for spec in specs.values()))


def _amount(spec: Value, name: str, pruning: Value | None) -> float:
    """The sparsity, or the width of the band; where the allocation or a pattern decides it, what was pruned."""
    if spec.get("band") is not None:
        low, high = (end.number(0, 1) for end in spec["band"].elements(2))
        return round(high - low, 6)
    given = spec["sparsity"].number(0, 1)
    if given or pruning is None or name not in pruning.mapping():
        return given
    counts = pruning[name]
    return round(counts["pruned"].number(0) / counts["weights"].number(1), 4)


def _method(spec: Value) -> str:
    criterion, allocation = (spec[part]["class"].identifier() for part in ("criterion", "allocation"))
    granularity = spec["granularity"].text()
    name = criterion.lower() if allocation == "Uniform" else f"{allocation.lower()}_{criterion.lower()}"
    own = {"Magnitude": "layer", "Wanda": "row", "SparseGPT": "column_block"}.get(criterion)
    parts = [name] if granularity == own else [name, f"by {granularity}"]
    return " ".join([*parts, *(["band"] if spec.get("band") is not None else [])])


def _choices(spec: Value) -> dict[str, str]:
    words = _words(spec.mapping(), "", ("sparsity", "band", "granularity", "class"))
    if spec.get("band") is not None:
        words["band from"] = f"{spec['band'].elements(2)[0].number(0, 1):g}"
    return words


def _words(values: Mapping[str, Any], prefix: str, skipped: tuple[str, ...] = ()) -> dict[str, str]:
    """Nested values as words by name: `{"allocation m": "5", "mode": "original"}`."""
    words: dict[str, str] = {}
    for key, value in values.items():
        name = prefix if key in ("options", "prompts") else f"{prefix} {printable(key)}".strip()
        if key in skipped:
            continue
        if isinstance(value, Mapping):
            words |= _words(value, name, skipped if key in ("criterion", "allocation") else ())
        else:
            words[name] = _word(value)
    return words


def _word(value: Any) -> str:
    if value is None:
        return "none"
    text = printable("+".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= 24 else "#" + sha256(text.encode()).hexdigest()[:8]
