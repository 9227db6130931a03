"""Modules that take the shapes of a file of a narrowed model: shapes alone say what was removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

import torch
from torch import nn

from sdprune.errors import InputError
from sdprune.pruning.narrowing.groups import Group, find_groups

Shapes = Mapping[str, Sequence[int]]
"""By the names of tensors in a file."""


def fit_to_shapes(component: nn.Module, shapes: Shapes) -> bool:
    """Narrow a component as far as a file is narrowed; which units it keeps has no meaning, the file has the weights.

    Args:
        component: as its configuration makes it, on the meta device or with any weights.
        shapes: of the tensors in the file, by their names in the component.

    Returns:
        Whether anything was narrowed.

    Raises:
        InputError: a number of units that narrowing cannot leave, by the name of the tensor; the component is then of
            no use.
    """
    narrowed = False
    for group in find_groups(component):
        count = _count(group, shapes)
        if count is not None and count != group.units:
            group.keep(torch.arange(count))
            narrowed = True
    return narrowed


def require_shapes(component: nn.Module, shapes: Shapes) -> None:
    """Raise InputError for a tensor of a file whose shape is not that of the narrowed component, by its name."""
    for name, parameter in component.named_parameters():
        found = shapes.get(name)
        if found is not None and tuple(found) != tuple(parameter.shape):
            raise InputError(
                f"{name} has shape {list(found)}, and a model narrowed like this one has {list(parameter.shape)}."
            )


def _count(group: Group, shapes: Shapes) -> Optional[int]:
    """How many units of a group a file has; None where it lacks the layer."""
    first = group.outputs[0]
    width = sum(one.width for one in group.outputs if one.layer == first.layer)
    name = f"{group.path(first)}.weight"
    shape = shapes.get(name)
    if shape is None or tuple(shape[1:]) != tuple(group.layer(first).weight.shape[1:]):
        return None  # narrowing leaves the inputs of this layer as they are: loading says what is wrong
    count, rest = divmod(shape[0], width)
    step = group.parts
    if rest or count % step or not 0 < count <= group.units:
        one = f"{step * width}" if step * width > 1 else "any number"
        raise InputError(
            f"{name} has {shape[0]} rows, and a model narrowed from this configuration has a multiple of {one}, "
            f"at most {group.units * width}."
        )
    return count
