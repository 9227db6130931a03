"""Pruning any module in one call."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn

from sdprune.calibration.calls import Call, calls_of, listed, tensors
from sdprune.calibration.collect import Collector
from sdprune.calibration.observer import InputObserver
from sdprune.calibration.pruned_error import alone_at
from sdprune.calibration.requests import Request
from sdprune.calibration.store import MemoryStore
from sdprune.errors import InputError, unknown
from sdprune.processes import Processes
from sdprune.pruning import PruneReport, PruneSpec, Statistics, apply, targets_of
from sdprune.pruning.narrowing import NarrowReport, NarrowSpec, choose, groups_of, layers_of, pair_name, pairing
from sdprune.pruning.narrowing import narrow as apply_narrowing
from sdprune.pruning.narrowing.engine import LAYERS
from sdprune.pruning.statistics.alone_error import AloneError
from sdprune.pruning.statistics.layer_error import LayerError
from sdprune.pruning.statistics.pruned_error import Probe, PrunedError
from sdprune.pruning.statistics.removal_error import RemovalError

_Spec = TypeVar("_Spec", PruneSpec, NarrowSpec)


def prune(
    module: nn.Module,
    spec: Optional[PruneSpec] = None,
    statistics: Optional[Statistics] = None,
    *,
    inputs: Optional[Iterable[Any]] = None,
    **options: Any,
) -> PruneReport:
    """Prune a module in place.

    Args:
        module: any torch module with Linear, Conv2d or Conv1D layers.
        spec: what to prune and how; or give its fields as options: `sparsity=0.5, criterion="Wanda"`.
        statistics: of the layers' inputs, from `gather`, for criteria that need them; or give
        inputs: to gather them from, in evaluation mode. Each element is the input of one call: a tensor, a tuple of
            arguments, a dict of keyword arguments, or both as a pair (tuple, dict).
        options: fields of PruneSpec.

    Returns:
        The counts of every layer and a hash of the masks.

    Raises:
        InputError: for choices that make no sense, patterns that match no layer, weights that cannot be pruned, inputs
            that the module does not take and missing statistics.
    """
    made = _spec(PruneSpec, spec, options, "sparsity=0.5")
    if spec is None and made.dense and made.pattern is None and options.get("sparsity") is None:
        raise InputError("Nothing is to be pruned: give a sparsity, as in sparsity=0.5, a band or a granularity N:M.")
    spec = made
    if statistics is not None and not isinstance(statistics, Mapping):
        raise InputError(f"statistics is a {type(statistics).__name__}: give what sdprune.gather returns.")
    if inputs is None:
        return apply(module, spec, statistics)
    if statistics is not None:
        raise InputError("Give statistics or the inputs to gather them from, not both.")
    if not spec.statistics:
        return apply(module, spec)
    batches = listed(inputs)
    if not spec.sequential:
        return apply(module, spec, gather(module, batches, spec, spec.statistics))
    dense_spec = dataclasses.replace(spec, order="one_pass")
    dense = gather(module, batches, dense_spec, spec.allocation.statistics) if spec.allocation.statistics else {}
    return apply(module, spec, gather(module, batches, spec, spec.criterion.statistics, dense), dense)


def gather(
    module: nn.Module,
    inputs: Iterable[Any],
    spec: PruneSpec,
    names: Iterable[str] | str,
    dense: Optional[Statistics] = None,
) -> dict[str, dict[str, Tensor]]:
    """Statistics of a module's layers from inputs to the module, by name, then by layer.

    The module runs in evaluation mode.

    Args:
        module: any module, dense; it is dense again afterwards.
        inputs: each element is the input of one call: a tensor, a tuple of arguments, a dict of keyword arguments, or
            both as (tuple, dict). The first axis of the first tensor in it counts samples.
        spec: says which layers, and in sequential order how they are pruned.
        names: of the statistics, or the name of one.
        dense: in sequential order, what the allocation reads.

    Raises:
        InputError: for inputs that `forward` does not take, or none.
    """
    calls = calls_of(module, inputs)
    targets_of(module, spec)  # refuses weights that cannot be pruned, before anything runs
    store = MemoryStore()
    before = tuple(Request("", name, spec, {"statistic": name, "of": "the dense module"}) for name in dense or ())
    for request in before:
        store.add(request.facts, (dense or {})[request.statistic])
    names = {names} if isinstance(names, str) else set(names)
    errors = [AloneError.name, PrunedError.name]
    probe = spec.allocation.probe if names & set(errors) else None
    sums = sorted((names | (spec.criterion.statistics if probe else set())) - set(errors))
    requests = [Request("", name, spec, {"statistic": name}, spec.sequential, before) for name in sums]
    if probe is not None:
        alone = alone_at(spec, probe.levels[0])
        for name in errors:
            requests.append(Request("", name, alone, {"statistic": name}, before=tuple(requests), probe=probe))
    found = _collected(module, calls, requests, store)
    return {name: one for name, one in found.items() if name in names}


def _collected(
    module: nn.Module, calls: list[Call], requests: Sequence[Request], store: Optional[MemoryStore] = None
) -> dict[str, dict[str, Tensor]]:
    """What requests ask for, by statistic, then by layer."""
    store = store or MemoryStore()
    subject = _Module(module, calls)
    collector = Collector({"": subject}, requests, store, processes=Processes(alone=True), first=subject.first)
    collector.run(lambda: ((call, index, call.samples) for index, call in enumerate(calls)))
    return {one.statistic: dict(store.load(one.facts)) for one in requests}


def narrow(
    module: nn.Module,
    spec: Optional[NarrowSpec] = None,
    *,
    inputs: Optional[Iterable[Any]] = None,
    **options: Any,
) -> NarrowReport:
    """Remove attention heads, feed-forward neurons, channels of residual blocks or whole layers, in place.

    Args:
        module: any torch module with such parts, dense; of diffusers or transformers, where whole layers are dropped.
        spec: what to remove and how; or give its fields as options: `neurons=0.3, criterion="Wanda"`.
        inputs: for all but Magnitude without a refit, as in `prune`.
        options: fields of NarrowSpec.

    Returns:
        What every part kept, and the parameters before and after.

    Raises:
        InputError: for choices that make no sense, parts that the module does not have, inputs that it does not take.
    """
    spec = _spec(NarrowSpec, spec, options, "neurons=0.3")
    if not spec.removes:
        raise InputError("Nothing is to be removed: give a share, as in neurons=0.3.")
    if spec.calibrates and inputs is None:
        raise InputError("Give the inputs to calibrate on, or criterion='Magnitude' with refit=False.")
    batches = listed(inputs) if spec.calibrates and inputs is not None else []
    groups = groups_of(module, spec)
    parts = [(group, part) for group in groups for part in group.inputs]
    readers = PruneSpec(layers=LAYERS, include=[group.path(part) for group, part in parts], timesteps=spec.timesteps)
    requests = [Request("", name, readers, {"statistic": name}) for name in sorted(spec.statistics) if parts]
    if spec.flops:
        facts = {"statistic": RemovalError.name}
        requests.append(Request("", RemovalError.name, readers, facts, False, tuple(requests), spec.probe, spec))
    if keys := [one.key for one in layers_of(module, spec)]:
        some, probe = PruneSpec(layers=["Linear"], include=keys), replace(spec.layer_probe, read_at="output")
        requests.append(Request("", LayerError.name, some, {"statistic": LayerError.name}, probe=probe, narrow=spec))
    units = choose(module, spec, _collected(module, calls_of(module, batches), requests) if requests else {})
    if not spec.refit or not parts:
        return apply_narrowing(module, spec, units)
    with pairing(module, groups, units):
        pairs = PruneSpec(layers=["Linear"], include=[pair_name(group, part) for group, part in parts])
        hessians = gather(module, batches, pairs, "hessian")["hessian"]
    return apply_narrowing(module, spec, units, hessians)


class _Module:
    """A module of which nothing is known: it runs as a whole, and all of its inputs count."""

    name, steps, calls_per_batch = "module", 1, 1

    def __init__(self, module: nn.Module, calls: list[Call]) -> None:
        self.module, self.calls = module, calls

    def run(self, call: Call, before_step: Callable[[int], None]) -> None:
        self.module(*call.args, **call.kwargs)

    def bring(self) -> None:
        pass

    def replays(self, sequential: bool) -> bool:
        return False

    def replaying(self, before_step: Callable[[int], None]) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(before_step)

    def first(self, samples: int) -> list[Call]:
        counts = list(accumulate(call.samples for call in self.calls))
        return self.calls[: 1 + sum(count < samples for count in counts)]

    def dense_inputs(self, calls: list[Call], probe: Probe) -> Callable[[], Tensor]:
        if probe.read_at == "prediction":
            raise InputError("read_at is prediction, and a module alone has no denoiser behind it: use output.")

        def run() -> Tensor:
            found = [next(tensors(self.module(*call.args, **call.kwargs))) for call in calls]
            return torch.cat([one.reshape(call.samples, -1) for call, one in zip(calls, found, strict=True)])

        return run

    def try_out(self) -> None:
        self.run(self.calls[0], lambda _: None)

    def set_up(self, observer: InputObserver, call: Call) -> None:
        pass


def _spec(kind: type[_Spec], spec: Optional[_Spec], options: dict[str, Any], example: str) -> _Spec:
    """The specification that is given, or the one that options make."""
    if spec is not None:
        if not isinstance(spec, kind):
            shown = " ".join(repr(spec).split())[:60]
            raise InputError(f"spec is {shown}: give a {kind.__name__}, or its fields by name, as in {example}.")
        if options:
            raise InputError(f"Give a spec or the options {', '.join(options)}, not both.")
        return spec
    fields = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in fields:
            raise unknown("option", option, fields)
    return kind(**options)
