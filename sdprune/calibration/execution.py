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
    follower = _Follower()
    with ExitStack() as stack:
        stack.enter_context(follower.inside)
        stack.callback(component.register_forward_pre_hook(follower.called, with_kwargs=True).remove)
        stack.callback(component.register_forward_hook(follower.returned).remove)
        for name in block_names(component):
            block = component.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(partial(follower.begin, name), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(follower.end, name)).remove)
        for target in targets:
            for one in target.by_module:
                hook = one.module.register_forward_pre_hook(partial(follower.reached, one), with_kwargs=True)
                stack.callback(hook.remove)
        yield follower.flow
    follower.finish()


class _Follower:
    """The hooks of `following`; `flow` is what they find."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.inside = ExitStack()
        """Open while the component runs for the first time."""
        self._seen = Dependencies()
        self._running: list[str] = []
        self._outputs: list[tuple[Tensor, int]] = []
        self._sound, self._over = True, False

    def called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The component begins."""
        if not self._over:
            self.flow.inputs = bytes_of((args, kwargs))
            self.inside.enter_context(self._seen)

    def returned(self, *_: Any) -> None:
        """The component ends."""
        self._over = True
        self.inside.close()

    def begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A block begins."""
        if self._over:
            return
        self._sound = self._sound and not self._running and name not in self.flow.blocks
        self._running.append(name)
        self.flow.reads.append((len(self.flow.blocks), self._seen.marks((args, kwargs))))

    def end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """A block ends."""
        if self._over:
            return
        self._running.pop()
        self._seen.mark(output, 1 << len(self.flow.blocks))
        tensors = [value for value in tree_iter(output) if isinstance(value, Tensor)]
        self._outputs += [(value, value._version) for value in tensors]
        self.flow.sizes.append(Counter(map(bytes_of, tensors)))
        self.flow.blocks.append(name)

    def reached(self, target: Target, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer begins."""
        if self._over:
            return
        done = len(self.flow.blocks)
        self.flow.places[target.name] = self.flow.places.get(target.name, (done, done))[0], done
        if not self._running:
            self.flow.reads.append((done, self._seen.marks((args, kwargs))))

    def finish(self) -> None:
        """Conclude, when nothing runs any more."""
        self.flow.order = list(self.flow.places)
        if not self._sound or any(value._version != version for value, version in self._outputs):
            self.flow.blocks = []


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
