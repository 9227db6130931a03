"""Narrowing: whole attention heads, neurons and channels are removed, so that a model is really smaller and faster."""

from sdprune.pruning.narrowing import groups
from sdprune.pruning.narrowing.engine import GroupReport, NarrowReport, choose, groups_of, narrow, narrow_shapes
from sdprune.pruning.narrowing.files import fit_to_shapes
from sdprune.pruning.narrowing.groups import Group, Grouping, Slice, find_groups
from sdprune.pruning.narrowing.refit import pair_name, pairing
from sdprune.pruning.narrowing.spec import NarrowSpec
from sdprune.schema import discover

__all__ = [
    "Group",
    "GroupReport",
    "Grouping",
    "NarrowReport",
    "NarrowSpec",
    "Slice",
    "choose",
    "find_groups",
    "fit_to_shapes",
    "groups_of",
    "narrow",
    "narrow_shapes",
    "pair_name",
    "pairing",
]

discover(groups)
