"""Requested and achieved: the nominal sparsity beside the pruned and the zero weights of ever larger scopes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sdprune.errors import unknown
from sdprune.pruning.engine import PruneReport


def account(
    components: Mapping[str, nn.Module], reports: Mapping[str, PruneReport], prunable: Sequence[str]
) -> dict[str, Any]:
    """Count what pruning did to a pipeline.

    Args:
        components: every module of the pipeline, as it is now.
        reports: of the components that were pruned.
        prunable: names of the components that the nominal figure divides by, pruned or not.

    Returns:
        JSON values: `nominal`, the requested sparsities weighted by whole components as if all their parameters were a
        target; and under `targets`, `components` (by name), `prunable` and `pipeline` the `parameters`, those `pruned`,
        the `zeros`, and both as fractions. Buffers do not count, shared parameters count once.
    """
    for name in [*reports, *prunable]:
        if name not in components:
            raise unknown("component", name, components)
    counts = {name: _parameters(module) for name, module in components.items()}
    pruned = {name: report.pruned for name, report in reports.items()}
    sizes = {name: sum(size for size, _ in counts[name].values()) for name in prunable}
    requested = sum(reports[name].nominal * size for name, size in sizes.items() if name in reports)
    return {
        "nominal": requested / max(1, sum(sizes.values())),
        "targets": _fractions(
            sum(report.weights for report in reports.values()),
            sum(pruned.values()),
            sum(report.zeros for report in reports.values()),
        ),
        "components": {name: _whole([name], counts, pruned) for name in components},
        "prunable": _whole(prunable, counts, pruned),
        "pipeline": _whole(components, counts, pruned),
    }


def scopes(accounts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `account` counted over, smallest first, by the names that people read."""
    return {
        "targeted weights": accounts["targets"],
        **accounts["components"],
        "all prunable components": accounts["prunable"],
        "whole pipeline": accounts["pipeline"],
    }


def _parameters(module: nn.Module) -> dict[int, tuple[int, int]]:
    """(size, zeros) of each parameter, by identity."""
    return {id(p): (p.numel(), p.numel() - int(p.count_nonzero())) for p in module.parameters()}


def _whole(
    names: Iterable[str], counts: Mapping[str, Mapping[int, tuple[int, int]]], pruned: Mapping[str, int]
) -> dict[str, Any]:
    names = list(names)
    distinct = {key: value for name in names for key, value in counts[name].items()}
    return _fractions(
        sum(size for size, _ in distinct.values()),
        sum(pruned.get(name, 0) for name in names),
        sum(zeros for _, zeros in distinct.values()),
    )


def _fractions(parameters: int, pruned: int, zeros: int) -> dict[str, Any]:
    whole = max(1, parameters)
    return {
        "parameters": parameters,
        "pruned": pruned,
        "zeros": zeros,
        "pruned_fraction": pruned / whole,
        "zero_fraction": zeros / whole,
    }
