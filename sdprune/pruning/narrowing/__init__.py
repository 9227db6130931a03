"""Narrowing: whole attention heads, neurons and channels are removed, so that a model is really smaller and faster."""

from sdprune.pruning.narrowing import groups
from sdprune.pruning.narrowing.engine import GroupReport, NarrowReport, narrow, narrow_shapes
from sdprune.pruning.narrowing.files import fit_to_shapes
from sdprune.pruning.narrowing.groups import Group, Grouping, Slice, find_groups
from sdprune.pruning.narrowing.spec import NarrowSpec
from sdprune.schema import discover

__all__ = [
    "Group",
    "GroupReport",
    "Grouping",
    "NarrowReport",
    "NarrowSpec",
    "Slice",
    "find_groups",
    "fit_to_shapes",
    "narrow",
    "narrow_shapes",
]

discover(groups)
