"""Which weights cannot be pruned, and what to do about it, by name, before anything starts."""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from sdprune.errors import InputError
from sdprune.pruning.memory import is_wrapper, named_tensors, overlaps, region
from sdprune.pruning.targets import Target, stored_weight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_prunable(component: nn.Module, targets: Sequence[Target]) -> None:
    """See that what pruning writes into each weight is stored there, and nowhere else.

    Args:
        component: holds the targets.
        targets: the chosen layers.

    Raises:
        InputError: for a weight that is computed from others, not initialized, quantized, or shares memory with
            a tensor that is not the weight of the same target.
    """
    for target in targets:
        weight = stored_weight(target.module)
        reason = _computed(target.module) if weight is None else _unusual(weight)
        if reason is not None:
            raise InputError(f"Layer {target.name!r} cannot be pruned: {reason}, or exclude the layer.")
    # A component that is itself a layer has the name "".
    owners = {f"{name}.weight".lstrip("."): target for target in targets for name in target.names}
    for one, other in overlaps(named_tensors(component)):
        if owners.get(one) is not owners.get(other):
            pruned, tensor = (one, other) if one in owners else (other, one)
            raise InputError(_shared(component, owners[pruned], pruned, tensor))


def _computed(module: nn.Module) -> str:
    tensors = {name.split(".")[0] for name, _ in named_tensors(module)}
    if is_parametrized(module, "weight"):
        parts = ", ".join(type(part).__name__.lstrip("_") for part in module.parametrizations["weight"])  # type: ignore[index]
        how, step = (
            f"a parametrization ({parts})",
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
        )
    elif "weight_mask" in tensors:
        how, step = "a mask of torch.nn.utils.prune", "torch.nn.utils.prune.remove(layer, 'weight')"
    elif "weight_v" in tensors and "weight_g" in tensors:
        how, step = "weight_norm", "torch.nn.utils.remove_weight_norm(layer)"
    elif "weight_orig" in tensors:
        how, step = "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"
    else:
        return "it stores no parameter `weight`, so that zeros would be lost; store one"
    return f"its weight is computed by {how}, so that zeros would be lost at the next forward pass; call {step} first"


def _unusual(weight: Tensor) -> Optional[str]:
    if is_lazy(weight):
        return "its weight is not initialized yet; run the module once"
    if is_wrapper(weight):
        return f"its weight is a {type(weight).__name__}, which stands for other tensors; load the plain weights"
    if weight.layout != torch.strided or weight.dtype not in _DTYPES:
        kind = weight.dtype if weight.layout == torch.strided else weight.layout
        return f"its weight is {kind}; load it as float32, bfloat16 or float16"
    place = region(weight)
    if place is not None and place.stop - place.start < weight.numel() * weight.element_size():
        return "several of its weights lie at one address, as after expand; store them one by one (clone)"
    return None


def _shared(component: nn.Module, target: Target, weight_name: str, tensor: str) -> str:
    tensors = dict(named_tensors(component))
    weight, other, layer = tensors[weight_name], tensors[tensor], weight_name.rpartition(".")[0]
    module = component.get_submodule(tensor.rpartition(".")[0])
    where = f"{tensor!r} ({type(module).__name__})"
    if (region(weight), weight.stride()) == (region(other), other.stride()):
        return (
            f"Layer {layer!r} shares its weight with {where}, which would be pruned too: "
            f"exclude {' or '.join(map(repr, target.names))}, or untie them by giving the layer a copy of the weight."
        )
    return (
        f"The weight of layer {layer!r} overlaps with {where} in memory, so that pruning one would change the other: "
        "give each a copy of its own (nn.Parameter(weight.clone())), or exclude both."
    )
