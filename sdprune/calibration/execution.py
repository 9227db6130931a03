"""In which order the layers of a component run, and what of them is pruned together in sequential order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import groupby
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from sdprune.pruning.blocks import block_names
from sdprune.pruning.dependencies import Dependencies
from sdprune.pruning.targets import Target


class Stop(Exception):  # noqa: N818  no error
    """Ends a run of a component whose rest is of no use."""


def order_of_calls(component: nn.Module, targets: Sequence[Target], run: Callable[[], Any]) -> list[str]:
    """Names of the targets in the order of their first calls in one forward pass; those that are not called lack.

    Args:
        component: holds the targets.
        targets: the layers.
        run: runs the component, or something that does; it is stopped after the component's first forward pass.
    """
    order: dict[str, None] = {}

    def called(target: Target, module: nn.Module, args: Any, kwargs: Any) -> None:
        target.inputs(args, kwargs)  # before the layer itself fails on them
        order.setdefault(target.name)

    def stop(*_: Any) -> None:
        raise Stop

    with ExitStack() as stack:
        for target in targets:
            for one in target.by_module:
                hook = one.module.register_forward_pre_hook(partial(called, one), with_kwargs=True)
                stack.callback(hook.remove)
        stack.callback(component.register_forward_hook(stop).remove)
        stack.enter_context(evaluating(component))
        with torch.no_grad(), suppress(Stop):
            run()
    return list(order)


@dataclass
class Flow:
    """How values go through the blocks of a component in one forward pass."""

    order: list[str] = field(default_factory=list)
    """Names of the layers in the order of their first calls."""
    blocks: list[str] = field(default_factory=list)
    """Names of the blocks in the order in which they run; none where they cannot be run one by one."""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By layer, how many blocks are done at its first and at its last call."""
    sizes: list[Counter[int]] = field(default_factory=list)
    """By block, how many tensors of so many bytes it gives."""
    inputs: int = 0
    """Bytes of the component's own arguments."""
    reads: list[tuple[int, int]] = field(default_factory=list)
    """How many blocks are done where something reads what blocks gave, and bits for those blocks."""

    def live(self, done: int) -> set[int]:
        """Numbers of the blocks among the first ones that are done whose outputs are read later on."""
        later = reduce(or_, (marks for place, marks in self.reads if place >= done), 0)
        return {number for number in range(done) if later >> number & 1}


def flow_of(component: nn.Module, targets: Sequence[Target], run: Callable[[], Any]) -> Flow:
    """Follow the outputs of blocks through one forward pass.

    Args:
        component: holds the targets.
        targets: the layers.
        run: runs the component, or something that does; it is stopped after the component's first forward pass.
    """
    with following(component, targets) as found:
        order_of_calls(component, targets, run)
    return found


@contextmanager
def following(component: nn.Module, targets: Sequence[Target]) -> Iterator[Flow]:
    """Follow the outputs of blocks through the component's first forward pass, whoever makes it.

    Args:
        component: holds the targets.
        targets: the layers.

    Yields:
        What is known at the end; no blocks where one runs several times or inside another, or is written into by a
        later one.
    """
    found, seen = Flow(), Dependencies()
    running: list[str] = []
    outputs: list[tuple[Tensor, int]] = []
    sound, inside, over = True, ExitStack(), False

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not over:
            found.inputs = bytes_of((args, kwargs))
            inside.enter_context(seen)

    def returned(*_: Any) -> None:
        nonlocal over
        over = True
        inside.close()

    def begin(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal sound
        if over:
            return
        sound = sound and not running and name not in found.blocks
        running.append(name)
        found.reads.append((len(found.blocks), seen.marks((args, kwargs))))

    def end(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if over:
            return
        running.pop()
        seen.mark(output, 1 << len(found.blocks))
        outputs.extend((value, value._version) for value in tree_iter(output) if isinstance(value, Tensor))
        found.sizes.append(Counter(bytes_of(one) for one in tree_iter(output) if isinstance(one, Tensor)))
        found.blocks.append(name)

    def hear(target: Target, module: nn.Module, args: Any, kwargs: Any) -> None:
        if over:
            return
        done = len(found.blocks)
        found.places[target.name] = found.places.get(target.name, (done, done))[0], done
        if not running:
            found.reads.append((done, seen.marks((args, kwargs))))

    with ExitStack() as stack:
        stack.enter_context(inside)
        stack.callback(component.register_forward_pre_hook(called, with_kwargs=True).remove)
        stack.callback(component.register_forward_hook(returned).remove)
        for name in block_names(component):
            block = component.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(partial(begin, name), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(end, name)).remove)
        for target in targets:
            for one in target.by_module:
                stack.callback(one.module.register_forward_pre_hook(partial(hear, one), with_kwargs=True).remove)
        yield found
    found.order = list(found.places)
    if not sound or any(value._version != version for value, version in outputs):
        found.blocks = []


def bytes_of(values: Any) -> int:
    """Bytes of all tensors in nested values."""
    return sum(value.numel() * value.element_size() for value in tree_iter(values) if isinstance(value, Tensor))


def stages(targets: Sequence[Target], order: Sequence[str]) -> list[list[Target]]:
    """The targets cut into what is pruned together, in the order in which it runs.

    A stage is a run of layers of one block: where others come between them, as a U-Net's blocks between its `conv_in`
    and `conv_out`, a block takes several stages. Layers that were not called join the last stage of their block, or
    else stages of their own at the end.

    Args:
        targets: the layers.
        order: names of those that are called, in the order of their first calls.
    """
    place = {name: i for i, name in enumerate(order)}
    called = sorted((target for target in targets if target.name in place), key=lambda target: place[target.name])
    found = [list(run) for _, run in groupby(called, key=lambda target: target.block)]
    last = {stage[0].block: stage for stage in found}
    for target in targets:
        if target.name not in place:
            if target.block not in last:
                found.append(last.setdefault(target.block, []))
            last[target.block].append(target)
    return found


@contextmanager
def evaluating(component: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards of each submodule the mode that it had.

    The flags are set one by one: `eval` and `train` may be overridden to do more than that.
    """
    training = [module for module in component.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
