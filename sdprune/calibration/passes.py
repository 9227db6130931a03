"""What is gathered in which pass over the calibration batches, and what is pruned after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from sdprune.calibration.execution import stages
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec, Target
from sdprune.pruning.plan import groups_of
from sdprune.pruning.statistics import InputStatistic

MEMORY = 8 << 30


@dataclass
class Pass:
    """One pass over the calibration batches."""

    observed: list[tuple[InputStatistic, list[Target]]]
    """Statistics that are gathered, each with its layers."""
    stage: int = 0
    """Number of the stage that the layers belong to."""
    prune: list[list[Target]] = field(default_factory=list)
    """Groups of layers that are pruned when it is over."""

    @property
    def memory(self) -> int:
        """Bytes of its sums, over the running batch and over all."""
        return sum(_bytes(one, target) for one, targets in self.observed for target in targets)

    def missing(self, stored: dict[str, set[str]]) -> bool:
        """Whether any of its statistics is not stored; `stored` has the layers of each statistic by name."""
        return any(target.name not in stored.get(one.name, ()) for one, targets in self.observed for target in targets)


def plan_passes(
    targets: Sequence[Target],
    statistics: Sequence[InputStatistic],
    memory: int = MEMORY,
    spec: Optional[PruneSpec] = None,
    order: Sequence[str] = (),
) -> list[Pass]:
    """The passes that gather statistics of a component.

    All statistics of the dense model take one pass, and those that do not fit into memory together more. In sequential
    order the layers are gathered stage by stage, as they run, and pruned at the end of their stage, so that what a pass
    gathers depends on the passes before. Layers that are ranked together in spite of being in several stages, as the
    stem's are by granularity module_block, are pruned at the end of the last of these.

    Args:
        targets: the layers.
        statistics: what to gather of each.
        memory: bytes that the sums of one pass may take, over the running batch and over all.
        spec: in sequential order, how layers are pruned at the end of their stage.
        order: names of the layers in the order in which they run, see `order_of_calls`; needed in sequential order.
            In one pass it puts layers that run one after another into one package, with all of their statistics.

    Raises:
        InputError: the statistics of a single layer exceed the memory.
    """
    parts = stages(targets, order) if spec else [_sorted(targets, order)]
    passes = [
        Pass(observed, number)
        for number, part in enumerate(parts)
        for observed in _packages(part, statistics, memory, bool(order))
    ]
    if spec is None:
        return passes
    stage_of = {target.name: number for number, part in enumerate(parts) for target in part}
    last = {one.stage: one for one in passes}
    for group in groups_of(targets, spec.ranked).values():
        last[max(stage_of[target.name] for target in group)].prune.append(group)
    return passes


def _sorted(targets: Sequence[Target], order: Sequence[str]) -> list[Target]:
    place = {name: number for number, name in enumerate(order)}
    return sorted(targets, key=lambda target: place.get(target.name, len(place)))


def _packages(
    targets: Sequence[Target], statistics: Sequence[InputStatistic], memory: int, by_layer: bool
) -> list[list[tuple[InputStatistic, list[Target]]]]:
    """Statistics and layers whose sums fit into memory together: layer by layer, or the small statistics first."""
    by_size = sorted(statistics, key=lambda one: sum(map(one.bytes_of, targets)))
    if by_layer:
        pairs = [(one, target) for target in targets for one in by_size]
    else:
        pairs = [(one, target) for one in by_size for target in targets]
    packages: list[dict[str, tuple[InputStatistic, list[Target]]]] = [{}]
    left = memory
    for one, target in pairs:
        size = _bytes(one, target)
        if size > memory:
            raise InputError(
                f"The {one.name} of layer {target.name!r} takes {size / 2**30:.1f} GiB, more than the "
                f"{memory / 2**30:.1f} GiB it may: raise the limit, or exclude the layer."
            )
        if size > left:
            packages.append({})
            left = memory
        packages[-1].setdefault(one.name, (one, []))[1].append(target)
        left -= size
    return [list(package.values()) for package in packages]


def _bytes(statistic: InputStatistic, target: Target) -> int:
    return 2 * statistic.bytes_of(target)  # of the batch and in all
