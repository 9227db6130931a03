"""Pruning any module in one call."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from torch import nn

from sdprune.errors import InputError, unknown
from sdprune.pruning.calls import listed
from sdprune.pruning.engine import PruneReport, apply
from sdprune.pruning.gathering import gather
from sdprune.pruning.plan import Statistics
from sdprune.pruning.spec import PruneSpec


def prune(
    module: nn.Module,
    spec: Optional[PruneSpec] = None,
    statistics: Optional[Statistics] = None,
    *,
    inputs: Optional[Iterable[Any]] = None,
    **options: Any,
) -> PruneReport:
    """Prune a module in place.

    Args:
        module: any torch module with Linear, Conv2d or Conv1D layers.
        spec: what to prune and how; or give its fields as options: `sparsity=0.5, criterion="Wanda"`.
        statistics: of the layers' inputs, from `gather`, for criteria that need them; or give
        inputs: to gather them from, in evaluation mode. Each element is the input of one call: a tensor, a tuple of
            arguments, a dict of keyword arguments, or both as a pair (tuple, dict).
        options: fields of PruneSpec.

    Returns:
        The counts of every layer and a hash of the masks.

    Raises:
        InputError: for choices that make no sense, patterns that match no layer, weights that cannot be pruned, inputs
            that the module does not take and missing statistics.
    """
    spec = _spec(spec, options)
    if statistics is not None and not isinstance(statistics, Mapping):
        raise InputError(f"statistics is a {type(statistics).__name__}: give what sdprune.gather returns.")
    if inputs is None:
        return apply(module, spec, statistics)
    if statistics is not None:
        raise InputError("Give statistics or the inputs to gather them from, not both.")
    if not spec.statistics:
        return apply(module, spec)
    batches = listed(inputs)
    if not spec.sequential:
        return apply(module, spec, gather(module, batches, spec, spec.statistics))
    dense_spec = PruneSpec(layers=spec.layers, include=spec.include, exclude=spec.exclude, blocks=spec.blocks)
    dense = gather(module, batches, dense_spec, spec.allocation.statistics) if spec.allocation.statistics else {}
    return apply(module, spec, gather(module, batches, spec, spec.criterion.statistics, dense), dense)


def _spec(spec: Optional[PruneSpec], options: dict[str, Any]) -> PruneSpec:
    if spec is not None:
        if not isinstance(spec, PruneSpec):
            shown = " ".join(repr(spec).split())[:60]
            raise InputError(f"spec is {shown}: give a PruneSpec, or its fields by name, as in sparsity=0.5.")
        if options:
            raise InputError(f"Give a spec or the options {', '.join(options)}, not both.")
        return spec
    fields = [field.name for field in dataclasses.fields(PruneSpec)]
    for option in options:
        if option not in fields:
            raise unknown("option", option, fields)
    made = PruneSpec(**options)
    if made.dense and made.pattern is None and options.get("sparsity") is None:
        raise InputError("Nothing is to be pruned: give a sparsity, as in sparsity=0.5, a band or a granularity N:M.")
    return made
