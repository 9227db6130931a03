"""The science, in pure torch: which weights, how they are scored, which of them go, and what that amounts to."""

from sdprune.pruning import allocation, criteria, granularity, statistics
from sdprune.pruning.accounting import account, scopes
from sdprune.pruning.allocation import Allocation
from sdprune.pruning.blocks import block_names
from sdprune.pruning.budget import Budget, InfeasibleError, Size
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.criteria.base import Ranking, Reconstruction
from sdprune.pruning.engine import LayerReport, PruneReport, apply, masks, targets_of
from sdprune.pruning.granularity import Granularity
from sdprune.pruning.plan import Statistics
from sdprune.pruning.spec import PruneSpec
from sdprune.pruning.statistics import Statistic, statistic, statistic_names
from sdprune.pruning.targets import Target, find_targets
from sdprune.schema import choices_of, discover

__all__ = [
    "Allocation",
    "Budget",
    "Criterion",
    "Granularity",
    "InfeasibleError",
    "LayerReport",
    "PruneReport",
    "PruneSpec",
    "Ranking",
    "Reconstruction",
    "Size",
    "Statistic",
    "Statistics",
    "Target",
    "account",
    "apply",
    "block_names",
    "find_targets",
    "masks",
    "scopes",
    "statistic",
    "statistic_names",
    "targets_of",
]

# Classes added as files are importable from here too.
for _folder in (allocation, criteria, granularity, statistics):
    discover(_folder)
globals().update(choices_of([Statistic, Criterion, Allocation]))
