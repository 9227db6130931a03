"""The layers that read units, refitted: their outputs are to be those of the dense model, from the units that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.pruning.narrowing.groups import Group, Slice
from sdprune.pruning.targets import Target

_PLACE = "narrowing"
"""Name of the module that holds the pairs while they are observed."""


class Pair(nn.Linear):
    """A layer that computes nothing, and is called with what a narrowed layer reads, 1, and what the dense one gives.

    The Hessian of these columns, [inputs, 1, outputs], is all that a least-squares fit needs, and it is gathered as
    that of any other layer.
    """

    def forward(self, columns: Tensor) -> Tensor:  # noqa: D102
        return columns


def pair_name(group: Group, part: Slice) -> str:
    """Name of the pair of a layer that reads units, in the component."""
    return f"{_PLACE}.{group.path(part).replace('.', '-')}"


@contextmanager
def pairing(component: nn.Module, groups: list[Group], units: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a dense component run each module of a group a second time, narrowed and on the same inputs, and call a pair.

    What a norm makes of the units that stay is seen so: it is not what it made of them among all.

    Args:
        component: dense; it is as it was afterwards.
        groups: of the component.
        units: those that stay, by the name of the group.
    """
    pairs = nn.ModuleDict()
    with ExitStack() as stack:
        for group in groups:
            twin = replace(group, module=deepcopy(group.module).eval())
            twin.keep(units[group.name])
            seen: dict[str, Tensor] = {}
            for part in group.inputs:
                reader, narrowed = group.layer(part), twin.layer(part)
                columns = narrowed.weight[0].numel() + 1 + len(reader.weight)
                pair = Pair(columns, 1, bias=False, device=reader.weight.device)
                pairs[pair_name(group, part).rpartition(".")[2]] = pair
                see = partial(_see, seen, Target(part.layer, narrowed, ""))
                stack.callback(narrowed.register_forward_pre_hook(see).remove)
                stack.callback(reader.register_forward_hook(partial(_call, seen, part.layer, pair)).remove)
            run = partial(_run, twin.module)
            stack.callback(group.module.register_forward_pre_hook(run, with_kwargs=True).remove)
        component.add_module(_PLACE, pairs)
        stack.callback(component._modules.pop, _PLACE)
        yield


@torch.no_grad()
def _run(twin: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
    twin(*args, **kwargs)


def _see(seen: dict[str, Tensor], target: Target, module: nn.Module, args: Any) -> None:
    inputs = target.inputs(args, {})
    seen[target.name] = target.columns(inputs).reshape(len(inputs), -1, target.shape[1])


@torch.no_grad()
def _call(seen: dict[str, Tensor], name: str, pair: Pair, module: nn.Module, args: Any, output: Tensor) -> None:
    inputs = seen.pop(name, None)
    if inputs is None:  # the module was not run as a whole; then the pair has no statistic, which is reported
        return
    outputs = output.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else output
    outputs = outputs.reshape(*inputs.shape[:2], -1)
    pair(torch.cat([inputs, torch.ones_like(inputs[..., :1]), outputs], -1))


@torch.no_grad()
def refit(layer: Any, hessian: Tensor, damping: float) -> None:
    """Give a narrowed layer the weights and the bias that make its outputs closest to those of the dense one.

    They minimise |W' X' + b' - Y|^2 + d |W' - W|^2 over the calibration inputs: X' what the layer reads now, Y what it
    gave when it was dense, W the weights of the columns that stay.

    Args:
        layer: a Linear or Conv2d with these weights W.
        hessian: of its pair, [inputs + 1 + outputs] squared.
        damping: d, as a share of the mean squared input.
    """
    weight = layer.weight.flatten(1).double()
    inputs = weight.shape[1]
    fitted = inputs + (layer.bias is not None)
    moments = hessian.to(weight.device).double()
    left, right = moments[:fitted, :fitted].clone(), moments[:fitted, inputs + 1 :].clone()
    weighting = damping * left.diagonal()[:inputs].mean()
    if not weighting > 0:  # nothing ever came in
        return
    left.diagonal()[:inputs] += weighting
    right[:inputs] += weighting * weight.T
    found = torch.linalg.solve(left, right).T
    layer.weight.copy_(found[:, :inputs].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(found[:, inputs])
