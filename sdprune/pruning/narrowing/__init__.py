"""Narrowing: heads, neurons, channels and whole layers are removed, so that a model is really smaller and faster."""

from sdprune.pruning.narrowing import groups
from sdprune.pruning.narrowing.engine import (
    GroupReport,
    NarrowReport,
    choose,
    groups_of,
    layers_of,
    narrow,
    narrow_shapes,
)
from sdprune.pruning.narrowing.files import fit_to_shapes, require_shapes
from sdprune.pruning.narrowing.groups import Group, Grouping, Slice, find_groups
from sdprune.pruning.narrowing.layers import Layer, drop_layers, find_layers
from sdprune.pruning.narrowing.refit import pair_name, pairing
from sdprune.pruning.narrowing.spec import NarrowSpec
from sdprune.schema import discover

__all__ = [
    "Group",
    "GroupReport",
    "Grouping",
    "Layer",
    "NarrowReport",
    "NarrowSpec",
    "Slice",
    "choose",
    "drop_layers",
    "find_groups",
    "find_layers",
    "fit_to_shapes",
    "groups_of",
    "layers_of",
    "narrow",
    "narrow_shapes",
    "pair_name",
    "pairing",
    "require_shapes",
]

discover(groups)
