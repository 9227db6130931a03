"""The facts of a model as plain lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sdprune.calibration.progress import size_shown
from sdprune.pruning.targets import LAYER_KINDS


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """The facts that `inspect` gives, for people."""
    components = facts["components"]
    prunable = {name: one for name, one in components.items() if one["role"] is not None}
    return [
        f"{facts['model']}: {facts['family']}, {number_shown(facts['parameters'])} parameters; no weights were loaded",
        "",
        *_table([("component", "class", "parameters", *LAYER_KINDS[:2], "not prunable", "on disk")], components),
        *(line for name, one in prunable.items() for line in _structure(name, one, facts["layers"])),
        "",
        f"Calibration of the {' and '.join(facts['layers'])} layers, {facts['steps']} denoising steps, "
        f"{facts['captions']} captions, {8 * facts['bytes_per_number']} bits, "
        f"{size_shown(facts['memory'])} for the sums of a pass:",
        *_costs(prunable),
        "  stored: disk space for statistics. kept: disk space by which the pipeline runs once, over all processes.",
        "  Each pass runs the pipeline where a process may keep less (--model.calibration.kept_gib, 64 by default),",
        "  and that of a denoiser in sequential order unless it sees --model.calibration.latents=dense.",
        "",
        *_pruned(facts["pruned"]),
    ]


def _table(head: list[tuple[str, ...]], components: Mapping[str, Any]) -> list[str]:
    rows = list(head)
    for name, one in components.items():
        kinds = one.get("kinds", {})
        layers = [_layers(kinds.get(kind)) for kind in LAYER_KINDS[:2]]
        other = sum(entry["parameters"] for kind, entry in kinds.items() if kind not in LAYER_KINDS)
        stored = one["stored"]
        disk = "-" if stored is None else f"{size_shown(stored['bytes'])} {'+'.join(stored['numbers'])}"
        rows.append(
            (name, one["class"], number_shown(one["parameters"]), *layers, number_shown(other) if kinds else "-", disk)
        )
    return aligned(rows, left=(0, 1, 6))


def _layers(entry: Mapping[str, int] | None) -> str:
    return "-" if entry is None else f"{number_shown(entry['parameters'])} in {entry['tensors']}"


def _structure(name: str, one: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    """Blocks in the order in which they run, and what was found of layers."""
    found = ["", f"{name}: {len(one['blocks'])} blocks in the order in which they run"]
    found += [f"  {_run(run)}" for run in _runs(one["blocks"])]
    whole = sum(one["kinds"].get(kind, {}).get("parameters", 0) for kind in kinds)
    for what, text in (
        ("timestep_alone", "see the timestep alone"),
        ("text_alone", "see the text alone, the same at every step"),
        ("never_called", "are never called: they have no statistics"),
    ):
        layers = one["inputs"][what]
        if layers["layers"]:
            share = f"{layers['weights'] / whole:.1%} of the {' and '.join(kinds)} weights"
            found.append(f"  {len(layers['layers'])} layers {text} ({share}): {_patterns(layers['layers'])}")
    unread = one["unread"]
    if unread["modules"]:
        found.append(
            f"  no output depends on {_patterns(unread['modules'])} ({number_shown(unread['parameters'])} parameters)"
        )
    if idle := one["idle"]["layers"]:
        found.append(
            f"  the family leaves out {_patterns(idle)} ({number_shown(one['idle']['weights'])} weights): no effect"
        )
    found += [f"  one tensor: {' = '.join(names)}" for names in one["tied"]]
    return found


def _runs(blocks: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Neighbouring blocks of one list that are equally large."""
    runs: list[list[Mapping[str, Any]]] = []
    for block in blocks:
        if runs and _kin(block) == _kin(runs[-1][-1]):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _kin(block: Mapping[str, Any]) -> tuple[str, int, int]:
    return re.sub(r"\d+$", "", block["name"]), block["layers"], block["weights"]


def _run(run: Sequence[Mapping[str, Any]]) -> str:
    first, last = run[0], run[-1]
    layers = "1 layer" if first["layers"] == 1 else f"{first['layers']} layers"
    each = f"{layers}, {number_shown(first['weights'])} weights{'' if first['runs'] else ', never run'}"
    if first is last:
        return f"{first['name']}: {each}"
    return f"{first['name']} to {last['name'].rpartition('.')[2]}: {each} each"


def _patterns(names: Sequence[str]) -> str:
    """Names with * for numbers, each with how often it occurs."""
    found = Counter(re.sub(r"\d+", "*", name) for name in names)
    single = {re.sub(r"\d+", "*", name): name for name in names}
    shown = [single[pattern] if n == 1 else f"{pattern} ({n})" for pattern, n in found.items()]
    return ", ".join(shown[:8]) + (f", ... ({len(shown)} kinds in all)" if len(shown) > 8 else "")


def _costs(components: Mapping[str, Any]) -> list[str]:
    rows = [("criterion", "component", "statistics", "stored", "passes", "memory", "kept", "sequential", "kept")]
    for name in next(iter(components.values()))["criteria"]:
        for component, one in components.items():
            cost = one["criteria"][name]
            if cost["statistics"]:
                whole, stages = cost["one_pass"], cost["sequential"]
                first = (
                    ("a layer exceeds the memory", "-")
                    if whole is None
                    else (number_shown(whole["passes"]), size_shown(whole["memory"]))
                )
                kept = [size_shown(one["kept"]) if one and one["kept"] else "-" for one in (whole, stages)]
                last = "-" if stages is None else number_shown(stages["passes"])
                statistics = ", ".join(cost["statistics"])
                rows.append((name, component, statistics, size_shown(cost["bytes"]), *first, kept[0], last, kept[1]))
    free = [name for name, cost in next(iter(components.values()))["criteria"].items() if not cost["statistics"]]
    return [*aligned(rows, left=(0, 1, 2)), *(f"  {name} needs none." for name in free)]


def _pruned(pruned: Mapping[str, Any]) -> list[str]:
    rows = [("pruned", "sparsity", "of weights", "zeros", "parameters left", "actual")]
    for name, one in pruned["components"].items():
        rows.append((
            name, f"{one['sparsity']:.2%}", *(number_shown(one[key]) for key in ("weights", "pruned", "left")),
            f"{one['actual']:.2%}",
        ))  # fmt: skip
    rows.append((
        "all of these", f"{pruned['nominal']:.2%}", "", number_shown(pruned["pruned"]), number_shown(pruned["left"]),
        f"{pruned['actual']:.2%}",
    ))  # fmt: skip
    return aligned(rows, left=(0,))


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Rows as lines, with the columns of these numbers at the left and others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return [f"  {'  '.join(row)}".rstrip() for row in cells]


def number_shown(value: int) -> str:
    """A count, in millions where it is large."""
    return f"{value / 1e6:,.1f} M" if value >= 100_000 else f"{value:,}"
