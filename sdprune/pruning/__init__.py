"""The science, in pure torch: which weights, how they are scored, which of them go, and what that amounts to."""

from sdprune.pruning.accounting import account, wholes
from sdprune.pruning.allocation import Allocation
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.criteria.magnitude import Magnitude
from sdprune.pruning.criteria.wanda import Wanda
from sdprune.pruning.engine import LayerReport, PruneReport, masks, prune
from sdprune.pruning.spec import PruneSpec, subclasses
from sdprune.pruning.statistics import InputNorms, gather, merge
from sdprune.pruning.targets import Target, find_targets, module_block

__all__ = [
    "Allocation",
    "Criterion",
    "InputNorms",
    "LayerReport",
    "Magnitude",
    "PruneReport",
    "PruneSpec",
    "Target",
    "Uniform",
    "Wanda",
    "account",
    "find_targets",
    "gather",
    "masks",
    "merge",
    "module_block",
    "prune",
    "subclasses",
    "wholes",
]

# Criteria and allocations added as files are importable from here too.
globals().update(subclasses(Criterion) | subclasses(Allocation))
