"""The science, in pure torch: which weights, how they are scored, which of them go, and what that amounts to."""

from sdprune.pruning.accounting import account, wholes
from sdprune.pruning.allocation import Allocation
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.api import prune
from sdprune.pruning.blocks import block_names
from sdprune.pruning.budget import Budget, InfeasibleError, Size
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.criteria.base import Ranking, Reconstruction
from sdprune.pruning.criteria.magnitude import Magnitude
from sdprune.pruning.criteria.wanda import Wanda
from sdprune.pruning.engine import LayerReport, PruneReport, apply, masks, targets_of
from sdprune.pruning.execution import order_of_calls
from sdprune.pruning.gathering import Gathering, count_passes, gather, statistic
from sdprune.pruning.spec import PruneSpec, subclasses
from sdprune.pruning.statistics import (
    STATISTICS,
    Hessian,
    InputNorm,
    Listener,
    Statistic,
    Sums,
    Timesteps,
    Totals,
    weigh,
)
from sdprune.pruning.targets import Target, find_targets

__all__ = [
    "STATISTICS",
    "Allocation",
    "Budget",
    "Criterion",
    "Gathering",
    "Hessian",
    "InfeasibleError",
    "InputNorm",
    "LayerReport",
    "Listener",
    "Magnitude",
    "PruneReport",
    "PruneSpec",
    "Ranking",
    "Reconstruction",
    "Size",
    "Statistic",
    "Sums",
    "Target",
    "Timesteps",
    "Totals",
    "Uniform",
    "Wanda",
    "account",
    "apply",
    "block_names",
    "count_passes",
    "find_targets",
    "gather",
    "masks",
    "order_of_calls",
    "prune",
    "statistic",
    "subclasses",
    "targets_of",
    "weigh",
    "wholes",
]

# Criteria and allocations added as files are importable from here too.
globals().update(subclasses(Criterion) | subclasses(Allocation))
