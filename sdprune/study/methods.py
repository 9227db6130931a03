"""What a record says of one kind of component, in the study's words: the method, the sparsity, all other choices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Any

from sdprune.study.text import printable

KINDS = ("text", "image")
"""The text encoders, and what stands beside them: the U-Net."""
NARROWED = "narrowed"
"""The method of components that are narrowed and not pruned; it stands before that of those which are both."""
_CALIBRATION = ("component", "statistic", "layers", "version", "pipeline", "dtype", "prune", "allocation")
"""Facts of calibration that say nothing new of a run."""


def pruned(kind: str, config: Mapping[str, Any], results: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the columns of a kind: `text_method`, `text_sparsity`, `text_published`, and `text: NAME` of each choice.

    `config` and `results` are a record's, `names` those of the components of this kind.
    """
    found = _pruned(kind, config, results, names)
    narrowed = {name: spec for name, spec in (config.get("narrow") or {}).items() if name in names}
    for name, spec in narrowed.items():
        words = flat_words(spec, f"{name} narrow")
        found |= {f"{kind}: {key}": word for key, word in words.items()}
    if narrowed:
        found[f"{kind}_method"] = f"{NARROWED} {found[f'{kind}_method']}".strip()
    return found


def _pruned(kind: str, config: Mapping[str, Any], results: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    specs = {name: spec for name, spec in config["prune"].items() if name in names}
    if not specs:
        return {f"{kind}_method": "", f"{kind}_sparsity": 0.0, f"{kind}_published": True}
    counts = results.get("pruning") or {}
    first, *others = specs
    choices = _choices(specs[first]) | ({"of": "+".join(specs)} if len(specs) < len(names) else {})
    sparsity = _sparsity(specs[first], counts.get(first))
    for name in others:  # they usually are pruned alike
        more = {f"{name} {key}": value for key, value in _choices(specs[name]).items() if value != choices.get(key)}
        if _sparsity(specs[name], counts.get(name)) != sparsity:
            more[f"{name} sparsity"] = f"{_sparsity(specs[name], counts.get(name)):g}"
        choices |= more
    for facts in config.get("calibration") or []:
        if facts["component"] in specs:
            choices |= flat_words(facts, "calibration", _CALIBRATION)
    return {
        f"{kind}_method": _method(specs[first]),
        f"{kind}_sparsity": sparsity,
        f"{kind}_published": all(spec.get("mode", "exact") == "original" for spec in specs.values()),
        **{f"{kind}: {name}": word for name, word in choices.items()},
    }


def _sparsity(spec: Mapping[str, Any], counts: Mapping[str, Any] | None) -> float:
    """Return the sparsity or the width of the band; where an allocation or a pattern decides it, what was pruned."""
    if spec.get("band") is not None:
        low, high = spec["band"]
        return round(high - low, 6)
    if spec["sparsity"] or counts is None:
        return float(spec["sparsity"])
    return round(counts["pruned"] / counts["weights"], 4)


def _method(spec: Mapping[str, Any]) -> str:
    """Name a method, such as `magnitude`, `owl_wanda` or `wanda by layer`."""
    criterion, allocation = spec["criterion"]["class"], spec["allocation"]["class"]
    granularity = spec["granularity"]
    name = criterion.lower() if allocation == "Uniform" else f"{allocation.lower()}_{criterion.lower()}"
    default = {"Magnitude": "layer", "Wanda": "row", "SparseGPT": "column_block"}.get(criterion)
    by = "" if granularity == default else f" by {granularity}"
    return f"{name}{by}" + ("" if spec.get("band") is None else " band")


def _choices(spec: Mapping[str, Any]) -> dict[str, str]:
    words = flat_words(spec, "", ("sparsity", "band", "granularity", "class"))
    if spec.get("band") is not None:
        words["band from"] = f"{spec['band'][0]:g}"
    return words


def flat_words(values: Mapping[str, Any], prefix: str, skipped: tuple[str, ...] = ()) -> dict[str, str]:
    """Flatten nested values into words by name: `{"allocation m": "5", "mode": "original"}`."""
    words: dict[str, str] = {}
    for key, value in values.items():
        name = prefix if key in ("options", "prompts") else f"{prefix} {printable(key)}".strip()
        if key in skipped:
            continue
        if isinstance(value, Mapping):
            words |= flat_words(value, name, skipped if key in ("criterion", "allocation") else ())
        else:
            words[name] = _word(value)
    return words


def _word(value: Any) -> str:
    if value is None:
        return "none"
    text = printable("+".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= 24 else "#" + sha256(text.encode()).hexdigest()[:8]
