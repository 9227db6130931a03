"""Pruning any module in one call."""

from collections.abc import Iterable
from typing import Any, Optional

from torch import nn

from sdprune.errors import InputError
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
        module: any torch module with Linear or Conv2d layers.
        spec: what to prune and how; or give its fields as options: `sparsity=0.5, criterion="Wanda"`.
        statistics: of the layers' inputs, from `gather`, for criteria that need them; or give
        inputs: to gather them from. Each element is one call's input: a tensor, a tuple of arguments, or a dict of
            keyword arguments.
        options: fields of PruneSpec.

    Returns:
        The counts of every layer and a hash of the masks.

    Raises:
        InputError: for choices that make no sense, patterns that match no layer and missing statistics.
    """
    if spec is None:
        spec = PruneSpec(**options)
    elif options:
        raise InputError(f"Give a spec or the options {', '.join(options)}, not both.")
    if inputs is None or not spec.statistics:
        return apply(module, spec, statistics)
    batches = list(inputs)
    if not spec.sequential:
        return apply(module, spec, gather(module, batches, spec, spec.statistics))
    dense_spec = PruneSpec(layers=spec.layers, include=spec.include, exclude=spec.exclude, blocks=spec.blocks)
    dense = gather(module, batches, dense_spec, spec.allocation.statistics) if spec.allocation.statistics else {}
    return apply(module, spec, gather(module, batches, spec, spec.criterion.statistics, dense), dense)
