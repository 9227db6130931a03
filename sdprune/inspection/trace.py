"""What each layer's input depends on, and what no output depends on: from one prediction on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.calibration.dependencies import Dependencies
from sdprune.outside import reading
from sdprune.pipelines import DiffusersFamily
from sdprune.pruning import Target

LATENTS, TEXT, TIMESTEP = 1, 2, 4
_FIRST = 3  # bits from here on stand for parameters
_TOKENS = 77
_SIDE = 128  # of latents, where a denoiser does not say


@dataclass
class Trace:
    """What one prediction showed."""

    order: dict[str, list[str]] = field(default_factory=dict)
    """By component, names of the layers in the order of their first calls."""
    inputs: dict[tuple[str, str], int] = field(default_factory=dict)
    """By component and layer, which of LATENTS, TEXT and TIMESTEP its input depends on, over all calls."""
    unread: dict[str, list[str]] = field(default_factory=dict)
    """By component, names of the parameters that no output depends on."""


def trace(family: DiffusersFamily, modules: Mapping[str, nn.Module], targets: Mapping[str, list[Target]]) -> Trace:
    """Run a prediction without weights, and follow what goes into what.

    Args:
        family: wires the modules.
        modules: its text encoders and its denoiser, on the meta device.
        targets: by component, the layers to look at.

    Raises:
        InputError: the modules do not fit each other.
    """
    found, seen = Trace({name: [] for name in targets}), Dependencies()
    parameters = {name: dict(module.named_parameters()) for name, module in modules.items()}
    owners = {(name, one): value for name, own in parameters.items() for one, value in own.items()}
    bits = {key: 1 << number for number, key in enumerate(owners, _FIRST)}
    for key, value in owners.items():
        seen.mark(value, bits[key])

    def called(component: str, target: Target, module: nn.Module, args: Any, kwargs: Any) -> None:
        key = (component, target.name)
        if key not in found.inputs:
            found.order[component].append(target.name)
        found.inputs[key] = found.inputs.get(key, 0) | seen.marks((args, kwargs)) & (LATENTS | TEXT | TIMESTEP)

    with ExitStack() as stack:
        for component, own in targets.items():
            for target in own:
                for one in target.by_module:
                    hook = partial(called, component, target)
                    stack.callback(one.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(
            modules[family.denoiser].register_forward_pre_hook(partial(_mark_timestep, seen), with_kwargs=True).remove
        )
        stack.enter_context(reading(f"The parts of {family.files.path} do not fit each other"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("meta"))
        tokens, latents = _inputs(family, modules)
        seen.mark(list(tokens.values()), TEXT)
        seen.mark(latents, LATENTS)
        stack.enter_context(seen)
        output = seen.marks(family.predict(modules, tokens, latents))
    found.unread = {name: [one for one in own if not output & bits[name, one]] for name, own in parameters.items()}
    return found


def _inputs(family: DiffusersFamily, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens by text encoder, and latents of the model's own size."""
    denoiser: Any = modules[family.denoiser].config
    side = getattr(denoiser, "sample_size", None) or _SIDE
    tokens = {}
    for name, module in modules.items():
        if name != family.denoiser:
            config: Any = module.config
            length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
            tokens[name] = torch.zeros(1, length, dtype=torch.long)
    return tokens, torch.zeros(1, denoiser.in_channels, side, side)


def _mark_timestep(seen: Dependencies, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Put a marked timestep in the place of the one that a denoiser is called with."""
    bound = signature(module.forward).bind(*args, **kwargs)
    for name in ("timestep", "t"):
        if name in bound.arguments:
            given = bound.arguments[name]
            value = given.clone() if isinstance(given, Tensor) else torch.full((1,), given, device="meta")
            seen.mark(value, TIMESTEP)
            bound.arguments[name] = value
    return bound.args, bound.kwargs
