"""The name of a run, which says what is pruned and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

_LABEL = 79  # characters: with "pruned-" before and "-<fingerprint>" behind, 99


def label(
    prune: Mapping[str, Any],
    unpruned: str = "dense",
    total: float | None = None,
    narrow: Mapping[str, Any] | None = None,
) -> str:
    """What is pruned and how: `text_encoder-magnitude-layer-0.475-unet-owl-m5-wanda-row-0.35-original`.

    Options of a criterion or an allocation, order, timesteps, blocks and mode stand there where they are not the
    default; at the end those that all components share. A name of this and the fingerprint has less than 100
    characters: a label that is too long goes without those granularities that are their criterion's default, and then
    without these options too. Where nothing is pruned it is `unpruned`.
    What is narrowed stands first.
    """
    before = [word for component, spec in sorted((narrow or {}).items()) for word in (component, *_narrowed(spec))]
    if before and not prune:
        return _written(before)[:_LABEL]
    if not prune:
        return re.sub(r"[^\w.-]", "_", unpruned, flags=re.ASCII)[-_LABEL:]
    settings = [_settings(spec) for spec in prune.values()]
    shared = settings[0] if settings and all(one == settings[0] for one in settings) else []
    for granularity, options in ((True, True), (False, True), (False, False)):
        parts = [*before, *([] if total is None else [f"total-{total:g}"])]
        for component, spec in sorted(prune.items()):
            parts += [component, *_pruned(spec, granularity, options, total is None)]
            parts += _settings(spec) if options and not shared else []
        name = _written(parts + (shared if options else []))
        if len(name) <= _LABEL:
            break
    return name[:_LABEL]


def _written(words: list[str]) -> str:
    return re.sub(r"[^\w.-]", "_", "-".join(words), flags=re.ASCII)


def _narrowed(spec: Any) -> list[str]:
    """`narrow-channels0.4-heads0.2-wanda-plain`: the shares, the criterion, and whether nothing is refitted; whole
    layers are chosen without a criterion."""
    shares = [f"flops{spec.flops:g}"] if spec.flops else [f"{kind}{share:g}" for kind, share in spec.shares.items()]
    choice = [type(spec.criterion).__name__.lower(), *([] if spec.refit else ["plain"])]
    return ["narrow", *shares, *(choice if spec.units else [])]


def _pruned(spec: Any, granularity: bool, options: bool, sparsity: bool) -> list[str]:
    parts = _named(spec.allocation, options) if type(spec.allocation).__name__ != "Uniform" else []
    parts += _named(spec.criterion, options)
    if granularity or spec.granularity != spec.criterion.granularities[0]:
        parts.append(str(spec.granularity))
    if spec.band is not None:
        parts.append("band-{:g}-{:g}".format(*spec.band))
    elif sparsity and spec.sparsity and not spec.pattern:  # else a pattern or the allocation says how much
        parts.append(f"{spec.sparsity:g}")
    return parts


def _named(part: Any, options: bool) -> list[str]:
    """The name of a criterion or an allocation, and its numbers that are not the default."""
    name = type(part).__name__.lower()
    changed = [
        f"{key.strip('_')}{value:g}"
        for key, one in signature(type(part)).parameters.items()
        if isinstance(value := getattr(part, key, None), (int, float)) and value != one.default
    ]
    return [name, *changed] if options else [name]


def _settings(spec: Any) -> list[str]:
    """The choices of how statistics are gathered and weights are counted that are not the default."""
    chosen = spec.describe()  # None where a choice has no effect
    names = ("order", "timesteps", "blocks", "mode")
    return [chosen[name] for name in names if chosen[name] not in (getattr(type(spec), name), None)]
