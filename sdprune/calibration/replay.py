"""Running blocks of a component on what those before them gave: no pass after the first one runs the pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, Union

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sdprune.calibration.execution import Flow, Stop
from sdprune.calibration.kept import Kept, OnFile, fetched, shape_of
from sdprune.calibration.passes import Pass


class Call(NamedTuple):
    """Arguments of one call of the component, kept."""

    args: Any
    kwargs: Any


Event = Union[int, Call]
"""A denoising step that begins, or a call."""


class Replay:
    """Runs a component on the calls that it had when its pipeline ran, pass by pass from the block that it stopped at.

    What blocks gave is kept as long as something that runs later reads it, see `Flow.live`. Blocks that are done give
    it again, or numbers of no meaning where nothing reads them any more.

    Args:
        component: holds the blocks.
        flow: how values go through them.
        passes: see `plan_passes`; layers that run earlier come in earlier passes.
    """

    def __init__(self, component: nn.Module, flow: Flow, passes: Sequence[Pass]) -> None:
        self.component, self.flow = component, flow
        self.blocks = [component.get_submodule(name) for name in flow.blocks]
        self.calls: dict[int, list[Event]] = {}
        """By batch."""
        self._kept = Kept()
        self._outputs: dict[tuple[int, int], tuple[int, dict[int, Any]]] = {}
        """By batch and call, how many blocks are done and what they gave."""
        self._keep, self._stop = boundaries(flow, passes)

    def record(self, key: int, run: Callable[[Callable[[int], None]], Any]) -> None:
        """Keep the calls of a batch.

        Args:
            key: of the batch.
            run: runs the pipeline on it, and calls its argument when a denoising step begins.
        """
        events = self.calls.setdefault(key, [])
        copies: dict[tuple[int, int], tuple[Tensor, Any]] = {}  # most arguments are the same in all steps

        def keep(value: Tensor) -> Any:
            place = (id(value), value._version)
            if place not in copies:
                copies[place] = (value, self._kept.put(value))
            return copies[place][1]

        def called(module: nn.Module, args: Any, kwargs: Any) -> None:
            events.append(Call(*tree_map_only(Tensor, keep, (args, kwargs))))

        hook = self.component.register_forward_pre_hook(called, with_kwargs=True)
        try:
            run(events.append)
        finally:
            hook.remove()

    def run(self, number: int, key: int, before_step: Callable[[int], None]) -> None:
        """Run a batch in a pass, as far as the pass and the one after it need.

        Args:
            number: of the pass.
            key: of the batch.
            before_step: called when a denoising step begins.
        """
        keep, stop = self._keep[number], self._stop[number]
        for index, event in enumerate(self.calls[key]):
            if isinstance(event, int):
                before_step(event)
                continue
            done, outputs = self._outputs.get((key, index), (0, {}))
            found = dict(outputs)
            with ExitStack() as stack:
                for place, block in enumerate(self.blocks[:done]):
                    stack.enter_context(_answering(block, outputs[place]))
                for place in range(done, keep):
                    stack.enter_context(self._keeping(place, place in self.flow.live(keep), found))
                if stop < len(self.blocks):
                    stack.callback(self.blocks[stop].register_forward_pre_hook(_end).remove)
                args, kwargs = fetched(event.args), fetched(event.kwargs)
                with suppress(Stop):
                    self.component(*args, **kwargs)
            live = self.flow.live(keep)
            self._outputs[key, index] = (
                keep,
                {
                    place: value if place in live else tree_map_only(OnFile, lambda one: one.shape, value)
                    for place, value in found.items()
                },
            )

    @contextmanager
    def _keeping(self, place: int, live: bool, found: dict[int, Any]) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[place] = tree_map_only(Tensor, self._kept.put if live else shape_of, output)

        hook = self.blocks[place].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()


def boundaries(flow: Flow, passes: Sequence[Pass]) -> tuple[list[int], list[int]]:
    """By pass, how many blocks are done for good after it, and in front of which one it may stop.

    A block is done when no layer of it, nor one before it, is observed in a later pass or pruned before that.
    """
    end = len(flow.blocks)
    heard = [_places(flow, [target.name for _, targets in one.observed for target in targets]) for one in passes]
    pruned = [_places(flow, [target.name for group in one.prune for target in group]) for one in passes]
    keep, stop = [], []
    for number in range(len(passes)):
        later = [place for places in heard[number + 1 :] for place, _ in places]
        later += [place for places in pruned[number:-1] for place, _ in places]
        keep.append(min(later, default=end) if number + 1 < len(passes) else 0)
        stop.append(max([keep[-1], *(last + 1 for _, last in heard[number])]))
    return keep, stop


def most_kept(flow: Flow, passes: Sequence[Pass]) -> int:
    """Bytes of the file that keeps one call, at most: a tensor takes the place of another of its size only."""
    most: Counter[int] = Counter()
    for keep in boundaries(flow, passes)[0]:
        most |= sum((flow.sizes[place] for place in flow.live(keep)), Counter())
    return flow.inputs + sum(size * count for size, count in most.items())


def _places(flow: Flow, layers: Sequence[str]) -> list[tuple[int, int]]:
    return [flow.places[layer] for layer in layers if layer in flow.places]


def _end(*_: Any) -> None:
    raise Stop


@contextmanager
def _answering(block: nn.Module, output: Any) -> Iterator[None]:
    before = vars(block).get("forward")
    block.forward = lambda *args, **kwargs: fetched(output)
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
