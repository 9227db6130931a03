"""Running a chain of blocks one or two at a time, on what those before them gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from sdprune.calibration.execution import Stop
from sdprune.calibration.observer import InputObserver
from sdprune.pruning.blocks import STEM
from sdprune.pruning.targets import Target


class Replay:
    """Runs a chain of blocks from where it stopped: those that are done give what they gave before.

    Args:
        component: holds the blocks, which its forward calls one after another.
        stages: its layers, stage by stage in the order in which they run; their blocks make the chain.
    """

    def __init__(self, component: nn.Module, stages: Sequence[Sequence[Target]]) -> None:
        self.blocks: list[nn.Module] = []
        self.index: dict[str, int] = {}  # by layer, how many blocks come before
        numbers: dict[str, int] = {}
        for stage in stages:
            block = stage[0].block
            if block != STEM and block not in numbers:
                numbers[block] = len(self.blocks)
                self.blocks.append(component.get_submodule(block))
            self.index |= {target.name: numbers.get(block, len(self.blocks)) for target in stage}
        self.outputs: dict[int, tuple[int, Any]] = {}  # by batch: number of a block, what it gave

    def run(self, key: int, observers: Sequence[InputObserver], run: Callable[[], Any]) -> None:
        """Run a batch up to the last layer that is observed to."""
        observed = [target for observer in observers for target in observer.targets.values()]
        current = max(self.index[target.name] for target in observed)
        done, output = self.outputs.get(key, (-1, None))
        with ExitStack() as stack:
            for block in self.blocks[: done + 1]:
                stack.enter_context(_answering(block, output))
            if current - 1 > done:
                stack.enter_context(self._recording(key, current - 1))
            stack.enter_context(_stopping_after(observed))
            with suppress(Stop):
                run()

    @contextmanager
    def _recording(self, key: int, number: int) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[key] = (number, output)

        handle = self.blocks[number].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _answering(block: nn.Module, output: Any) -> Iterator[None]:
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del block.forward


@contextmanager
def _stopping_after(targets: Sequence[Target]) -> Iterator[None]:
    """End the run when every layer has heard its input; nothing after that is of use."""
    modules = [one.module for target in targets for one in target.by_module]
    waiting = {id(module) for module in modules}

    def heard(module: nn.Module, args: Any) -> None:
        waiting.discard(id(module))
        if not waiting:
            raise Stop

    handles = [module.register_forward_pre_hook(heard) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
