"""Pruning in one page: choose the layers, plan what each loses, zero or reconstruct, report."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pruning.plan import Plan, Statistics
from sdprune.pruning.prunable import require_prunable
from sdprune.pruning.spec import PruneSpec
from sdprune.pruning.statistics import statistic_names
from sdprune.pruning.targets import Target, find_targets


@dataclass
class LayerReport:
    """What happened to one layer: counts of its weights, of those pruned, and of the zeros it has now."""

    name: str
    kind: str
    block: str
    weights: int
    pruned: int
    zeros: int
    notes: Dict[str, Any] = field(default_factory=dict)
    tied: List[str] = field(default_factory=list)
    """Further names of the same weight."""


@dataclass
class PruneReport:
    """What happened to a component.

    `mask_hash` is equal exactly when every mask is, whatever process or granularity produced it.
    """

    spec: dict[str, Any]
    nominal: float
    layers: List[LayerReport] = field(default_factory=list)
    mask_hash: str = ""
    sensitivity: Optional[Dict[str, Any]] = None
    """What was measured of its units, where that decided how much each lost."""

    @property
    def weights(self) -> int:
        """Targeted weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def pruned(self) -> int:
        """Weights that a mask covers."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Zeros among the targeted weights, pruned or there before."""
        return sum(layer.zeros for layer in self.layers)

    def summary(self) -> dict[str, Any]:
        """The report without its layers, as JSON."""
        counts = {name: getattr(self, name) for name in ("weights", "pruned", "zeros")}
        measured = {} if self.sensitivity is None else {"sensitivity": self.sensitivity}
        return {"spec": self.spec, "mask_hash": self.mask_hash, **counts, **measured}


def apply(
    component: nn.Module,
    spec: PruneSpec,
    statistics: Optional[Statistics] = None,
    dense_statistics: Optional[Statistics] = None,
) -> PruneReport:
    """Prune a component in place: pruned weights become 0, others keep their bits, unless the criterion reconstructs.

    Args:
        component: a text encoder, a U-Net or any other module, dense.
        spec: what to prune and how; a sparsity of 0 touches nothing.
        statistics: of the layers' inputs, as the criterion names them, by layer: `input_norm` [steps, groups, columns],
            `hessian` [groups, columns, columns]. It may read its values lazily.
        dense_statistics: those that the allocation names, of the dense model, where `statistics` are others.

    Raises:
        InputError: for patterns that match no layer, missing statistics and NaN scores, naming the layer. At NaN scores
            earlier layers may have been pruned already.
    """
    targets = targets_of(component, spec)
    for target in targets:
        if target.weight.is_meta:
            raise InputError(f"Layer {target.name!r} is on the meta device, where it has no numbers: load the weights.")
    with _declared(spec.allocation):
        plan = Plan(targets, spec, statistics or {}, dense_statistics or statistics or {})
    return prune_targets(targets, plan)


@contextmanager
def _declared(part: Any) -> Iterator[None]:
    """Name a statistic that a criterion or an allocation reads although its class does not say so."""
    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else None
        if name not in statistic_names() or name in part.statistics:
            raise
        raise InputError(
            f"{type(part).__name__} reads the statistic {name}, which its class does not name: set `statistics = "
            f"frozenset({sorted({name, *part.statistics})})` in it."
        ) from error


def targets_of(component: nn.Module, spec: PruneSpec) -> list[Target]:
    """The layers that a specification chooses.

    Raises:
        InputError: also for a chosen layer whose weight cannot be pruned, by name.
    """
    targets = find_targets(component, spec.layers, spec.include, spec.exclude, spec.blocks)
    require_prunable(component, targets)
    return targets


@torch.no_grad()
def prune_targets(targets: Sequence[Target], plan: Plan) -> PruneReport:
    """Prune some or all of the targets of a plan in place."""
    reports: dict[str, LayerReport] = {}
    digests: dict[str, bytes] = {}
    with _declared(plan.spec.criterion):
        for target, mask, weight, notes in plan.work(targets):
            if not plan.spec.dense:
                target.write(mask, weight)
            weights, pruned = target.weight.numel(), int(mask.count_nonzero())
            zeros = weights - int(target.weight.count_nonzero())
            reports[target.name] = LayerReport(
                target.name, target.kind, target.block, weights, pruned, zeros, notes, target.names[1:]
            )
            digests[target.name] = hashlib.sha256(np.packbits(mask.cpu().numpy()).data).digest()
            del mask, weight  # before the next one is made
    in_order = b"".join(digests[target.name] for target in targets)
    layers = [reports[target.name] for target in targets]
    return PruneReport(plan.spec.describe(), plan.spec.nominal, layers, hashlib.sha256(in_order).hexdigest())


def masks(
    targets: Sequence[Target], spec: PruneSpec, statistics: Optional[Statistics] = None
) -> Iterator[Tuple[Target, Tensor]]:
    """Each target with its mask, bool [rows, columns], True = prune, group by group.

    A target's weight may be changed as soon as its mask is out. Beside the current mask no more than one layer's scores
    are held at a time, of a rowwise criterion no more than a few rows'.
    """
    plan = Plan(targets, spec, statistics or {}, statistics or {})
    return ((target, mask) for target, mask, _, _ in plan.work(targets))
