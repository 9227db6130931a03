"""What each layer's input depends on, and what no output depends on: from one picture drawn without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from torch import nn
from torch.utils._pytree import tree_iter

from sdprune.pipelines.base import DiffusersFamily
from sdprune.pipelines.checks import dry_run
from sdprune.pipelines.sampling import Sampling
from sdprune.pruning import Target, find_targets
from sdprune.pruning.dependencies import Dependencies
from sdprune.pruning.targets import LAYER_KINDS, layer_kind

LATENTS, TEXT, TIMESTEP, OTHER = 1, 2, 4, 8
_FIRST = 4  # bits from here on stand for parameters


@dataclass
class Trace:
    """What one picture showed."""

    calls: int = 0
    """How often the denoiser was called."""
    inputs: dict[tuple[str, str], int] = field(default_factory=dict)
    """By component and layer, what its input depends on, over all calls: LATENTS, TEXT, TIMESTEP, or OTHER arguments of
    the denoiser, such as the picture's size."""
    unread: dict[str, list[str]] = field(default_factory=dict)
    """By component, names of the parameters that no output depends on."""


def trace(
    family: DiffusersFamily, modules: Mapping[str, nn.Module], targets: Mapping[str, Sequence[Target]],
    sampling: Sampling, beside: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Trace:  # fmt: skip
    """Draw one picture without weights, and follow what goes into what.

    Args:
        family: wires the modules.
        modules: all modules of its pipeline, on the meta device.
        targets: by component, the layers to look at; what is unread is found of these components.
        sampling: how it is drawn.
        beside: entered while it is drawn.

    Raises:
        InputError: the modules do not fit each other.
    """
    found, seen = Trace(), Dependencies()
    parameters = {name: dict(modules[name].named_parameters()) for name in targets}
    bits = {key: 1 << number for number, key in enumerate(_pairs(parameters), _FIRST)}
    for (name, one), bit in bits.items():
        seen.mark(parameters[name][one], bit)

    def called(component: str, target: Target, module: nn.Module, args: Any, kwargs: Any) -> None:
        key = (component, target.name)
        found.inputs[key] = found.inputs.get(key, 0) | seen.marks((args, kwargs)) & (1 << _FIRST) - 1

    def encodes(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.mark((args, kwargs), TEXT)

    def denoises(module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = signature(module.forward).bind(*args, **kwargs).arguments
        for value in tree_iter(arguments):
            if not seen.marks(value):
                seen.mark(value, OTHER)
        seen.mark(next(iter(arguments.values())), LATENTS)
        seen.mark(arguments[family.timestep], TIMESTEP)

    @contextmanager
    def watching(pipe: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for name, own in targets.items():
                hooks = [(modules[name], denoises if name == family.denoiser else encodes)] if name != "vae" else []
                hooks += [(one.module, partial(called, name, target)) for target in own for one in target.by_module]
                for module, hook in hooks:
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(seen)
            stack.enter_context(beside())
            yield

    drawn = dry_run(family, sampling, modules.__getitem__, watching)
    picture, found.calls = seen.marks(drawn.picture), drawn.calls
    found.unread = {name: [one for one in own if not picture & bits[name, one]] for name, own in parameters.items()}
    return found


def _pairs(values: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    return [(name, one) for name, own in values.items() for one in own]


class Proof(NamedTuple):
    """What can be said of a pipeline of a family whatever its weights are."""

    unread: Mapping[str, Mapping[str, str]]
    """By component, names of the parameters that no picture depends on, and how that is known: TRACED or DECLARED."""
    timed: Sequence[str]
    """Names of the denoiser's Linear layers whose input depends on the timestep alone."""
    text: Sequence[str]
    """Names of the denoiser's layers whose input depends on the text, and on nothing that changes from step to step."""


TRACED = "traced"
"""Followed through every operation of a picture that is drawn without numbers, with guidance and without."""
DECLARED = "declared"
"""Named by the family: outputs go into a tensor of which another part is read."""


def prove(family: DiffusersFamily) -> Proof:
    """Find out what pictures depend on, of the modules that the configurations describe.

    Raises:
        InputError: the modules do not fit each other.
    """
    found, modules = [], {}
    for guidance in (1.0, 7.5):
        modules = {name: family.files.empty_module(name, whole=True) for name in (*family.prunable, "vae")}
        kinds = {name: LAYER_KINDS if name == family.denoiser else () for name in modules}
        targets = {name: targets_of(module, kinds[name]) for name, module in modules.items()}
        found.append(trace(family, modules, targets, Sampling(steps=1, guidance=guidance)))
    unread: dict[str, dict[str, str]] = {}
    for name, module in modules.items():
        declared = family.prunable[name].declared_idle(module, LAYER_KINDS) if name in family.prunable else []
        layers = [one for one, _ in module.named_modules() if any(fnmatchcase(one, pattern) for pattern in declared)]
        names = {one for one, _ in module.named_parameters()}
        unread[name] = {one: DECLARED for one in names if one.rpartition(".")[0] in layers}
        unread[name] |= {one: TRACED for one in names if all(one in each.unread[name] for each in found)}
    seen: dict[str, int] = {}
    for each in found:
        for (_, layer), marks in each.inputs.items():
            seen[layer] = seen.get(layer, 0) | marks
    denoiser = modules[family.denoiser]
    return Proof(
        unread,
        [
            one
            for one, marks in seen.items()
            if marks == TIMESTEP and isinstance(denoiser.get_submodule(one), nn.Linear)
        ],
        [one for one, marks in seen.items() if marks & TEXT and not marks & (LATENTS | TIMESTEP)],
    )


def targets_of(module: nn.Module, kinds: Sequence[str]) -> list[Target]:
    """The layers of these kinds; those that the module lacks are not missed."""
    present = {layer_kind(one) for one in module.modules()}
    wanted = [kind for kind in kinds if kind in present]
    return find_targets(module, wanted) if wanted else []
