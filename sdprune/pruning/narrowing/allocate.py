"""How many units each module loses, by measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.error_path import ErrorPath, Unit
from sdprune.pruning.narrowing.groups import Group

_PARTS = 10**12
"""FLOPs of the component are counted in so many equal parts, in whole numbers."""


def shared_out(groups: Sequence[Group], errors: Mapping[str, Tensor], flops: float) -> dict[str, int]:
    """How many units of each group stay, so that the sum of their errors is as small as it can be.

    Every group loses whole steps, so that the component may lose a little more than it has to.

    Args:
        groups: of a component.
        errors: the statistic `removal_error` of each group, by its name.
        flops: the share of the component's FLOPs that has to go.

    Raises:
        InputError: more than all groups may lose.
    """
    found = {group.name: group.units for group in groups}
    groups, units = [group for group in groups if len(errors[group.name])], []
    for group in groups:
        shares, saved, lost = errors[group.name].T.tolist()
        size = round(_PARTS * saved[-1] / shares[-1])
        units.append(Unit(None, size, shares, lost, round(shares[-1] * group.units) // group.step))
    path, wanted = ErrorPath(units), round(_PARTS * flops)
    if wanted > path.most:
        raise InputError(
            f"flops is {flops:g}, and all that can be removed has {path.most / _PARTS:.3f} of the component's FLOPs: "
            "give less, or widen include."
        )
    for group, unit, lost in zip(groups, units, path.counts(wanted), strict=True):
        steps = math.ceil(lost * unit.steps / unit.most - 1e-6)
        found[group.name] -= steps * group.step
    return found
