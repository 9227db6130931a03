"""In which order the layers of a component run, and what of them is pruned together in sequential order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

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
