"""What each layer's input depends on, and what no output depends on: from one picture drawn without weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

from torch import nn

from sdprune.calibration.dependencies import Dependencies
from sdprune.calibration.execution import Flow, following
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pipelines.checks import dry_run
from sdprune.pruning import Target

LATENTS, TEXT, TIMESTEP = 1, 2, 4
_FIRST = 3  # bits from here on stand for parameters


@dataclass
class Trace:
    """What one picture showed."""

    flows: dict[str, Flow] = field(default_factory=dict)
    """By component, how values go through its blocks in its first call."""
    calls: int = 0
    """How often the denoiser is called."""
    inputs: dict[tuple[str, str], int] = field(default_factory=dict)
    """By component and layer, which of LATENTS, TEXT and TIMESTEP its input depends on, over all calls."""
    unread: dict[str, list[str]] = field(default_factory=dict)
    """By component, names of the parameters that no output depends on."""


def trace(
    family: DiffusersFamily, modules: Mapping[str, nn.Module], targets: Mapping[str, list[Target]], steps: int
) -> Trace:
    """Draw one picture without weights, with guidance, and follow what goes into what.

    Args:
        family: wires the modules.
        modules: all modules of its pipeline, on the meta device.
        targets: by prunable component, the layers to look at.
        steps: denoising steps.

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
        found.inputs[key] = found.inputs.get(key, 0) | seen.marks((args, kwargs)) & (LATENTS | TEXT | TIMESTEP)

    def encodes(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.mark((args, kwargs), TEXT)

    def denoises(module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = signature(module.forward).bind(*args, **kwargs).arguments
        seen.mark(next(iter(arguments.values())), LATENTS)
        seen.mark(arguments[family.timestep], TIMESTEP)

    @contextmanager
    def watching(pipe: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for name, own in targets.items():
                hooks = [(modules[name], denoises if name == family.denoiser else encodes)]
                hooks += [(one.module, partial(called, name, target)) for target in own for one in target.by_module]
                for module, hook in hooks:
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(seen)
            found.flows = {name: stack.enter_context(following(modules[name], own)) for name, own in targets.items()}
            yield

    drawn = dry_run(family, Sampling(steps), modules.__getitem__, watching)
    picture, found.calls = seen.marks(drawn.picture), drawn.calls
    found.unread = {name: [one for one in own if not picture & bits[name, one]] for name, own in parameters.items()}
    return found


def _pairs(values: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    return [(name, one) for name, own in values.items() for one in own]
