"""Pictures that prove it: drawn with and without, equal to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.errors import InputError
from sdprune.pipelines import DiffusersFamily, Sampling

PROMPTS = ("a photograph of a cat on a table", "two red birds")
_UNGUIDED = ("a blue chair",)
Pictures = tuple[Tensor, Tensor]
"""Guided ones and one without guidance, [b, 3, height, width] in floating point as the pipeline gives them."""


def draw(family: DiffusersFamily, sampling: Sampling) -> Pictures:
    """Draw two guided pictures, and one without guidance."""
    found = []
    for prompts, guidance in ((PROMPTS, sampling.guidance), (_UNGUIDED, 1.0)):
        one = replace(sampling, guidance=guidance)
        scheduler = family.new_scheduler(family.pipe.scheduler, one, lambda *_: None)
        found.append(family.draw(family.pipe, scheduler, prompts, range(len(prompts)), one, "pt").float().cpu())
    return found[0], found[1]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, and finite."""
    return bool(one.isfinite().all()) and torch.equal(one.view(torch.int32), other.view(torch.int32))


def seconds(family: DiffusersFamily, sampling: Sampling) -> float:
    """Seconds of this process for the guided pictures, without the VAE."""
    started = time.process_time() if family.pipe.device.type == "cpu" else time.perf_counter()
    family.generate(PROMPTS, range(len(PROMPTS)), sampling, decode=False)
    return (time.process_time() if family.pipe.device.type == "cpu" else time.perf_counter()) - started


@torch.no_grad()
def poison(components: Mapping[str, nn.Module], removed: Mapping[str, Iterable[str]]) -> None:
    """Put NaN in the place of all weights of modules: it spreads to whatever depends on them."""
    for name, modules in removed.items():
        for one in modules:
            for parameter in components[name].get_submodule(one).parameters():
                parameter.fill_(float("nan"))


@dataclass
class Rows:
    """What layers of a denoiser give at each timestep."""

    timesteps: list[float] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def recording(denoiser: nn.Module, layers: Iterable[str], argument: str) -> Iterator[Rows]:
    """Keep what layers give while pictures are drawn.

    Args:
        denoiser: whose layers they are.
        layers: their names.
        argument: of the denoiser's call, which holds the timestep.
    """
    found, handles, new = Rows(), [], False

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal new
        value = torch.as_tensor(signature(module.forward).bind(*args, **kwargs).arguments[argument]).flatten()[0].item()
        new = value not in found.timesteps
        if new:
            found.timesteps.append(float(value))

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        own = found.rows.setdefault(name, [])
        flat = output.detach().flatten(0, -2)
        if not (flat == flat[0]).all():
            raise InputError(f"{name} gives other numbers for other pictures of a call: leave out --tables.")
        if new and len(own) < len(found.timesteps):
            own.append(flat[0].clone())

    try:
        handles.append(denoiser.register_forward_pre_hook(begin, with_kwargs=True))
        handles += [denoiser.get_submodule(one).register_forward_hook(partial(keep, one)) for one in layers]
        yield found
    finally:
        for handle in handles:
            handle.remove()
