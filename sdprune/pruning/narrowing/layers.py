"""Whole residual layers that can be dropped, so that a configuration of the same class still describes the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from torch import nn

_COUNTS = {
    "layers": ("num_hidden_layers", "n_layers"), "block": ("num_layers",), "transformer_blocks": ("num_layers",),
    "single_transformer_blocks": ("num_single_layers",),
}  # fmt: skip
"""Lists of layers as transformers and diffusers name them, and the options that count these."""
_BY_LAYER = "layer_types"
"""Option of transformers that says something of each layer."""
_NUMBERS = "dual_attention_layers"
"""Option of diffusers that holds numbers of layers."""
_UNET = "transformer_layers_per_block"
_UNET_UP = f"reverse_{_UNET}"
_OF_UNET = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks")


@dataclass(frozen=True)
class Layer:
    """A layer that only adds to the residual stream, so that the stream passes where it is dropped.

    Args:
        name: in the component.
        key: name of its first Linear layer: statistics of the layer are kept under it.
    """

    name: str
    key: str


@dataclass(frozen=True)
class _Stack:
    """Layers one behind another.

    Args:
        name: of their list, in the component.
        layers: the list.
        config: holds the options: of transformers, or the component itself, of diffusers.
        count: the option that counts the layers; a U-Net has one for all of its stacks.
        pinned: numbers of layers that cannot be dropped.
    """

    name: str
    layers: nn.ModuleList
    config: Any
    count: str
    pinned: Collection[int]

    def options(self, kept: Sequence[int]) -> dict[str, Any]:
        """What the configuration says when these layers are left."""
        if self.count == _UNET:
            return _unet_options(self.config)
        found: dict[str, Any] = {self.count: len(kept)}
        if by_layer := _option(self.config, _BY_LAYER):
            found[_BY_LAYER] = [by_layer[number] for number in kept]
        if numbers := _option(self.config, _NUMBERS):
            found[_NUMBERS] = [new for new, old in enumerate(kept) if old in numbers]
        return found


def find_layers(component: nn.Module) -> list[Layer]:
    """The layers that can be dropped, in the order of the component's modules.

    The last layer of a stack of transformers stays: pipelines count hidden states from the end. So does a layer whose
    parameters are unlike those of all others, since a configuration cannot say that it is gone.
    """
    return [
        Layer(f"{stack.name}.{number}", f"{stack.name}.{number}.{linear}")
        for stack in _stacks(component)
        for number, layer in enumerate(stack.layers)
        if number not in stack.pinned and (linear := _first_linear(layer))
    ]


def drop_layers(component: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """Drop layers from a component and from its configuration; those that are left are numbered anew.

    Args:
        component: of diffusers or transformers.
        names: of layers that `find_layers` gives.

    Returns:
        Puts them back.
    """
    undo: list[Callable[[], None]] = []
    for stack in list(_stacks(component)):
        kept = [number for number in range(len(stack.layers)) if f"{stack.name}.{number}" not in names]
        if len(kept) < len(stack.layers):
            before = list(stack.layers)
            undo.append(partial(_fill, stack.layers, before))
            _fill(stack.layers, [before[number] for number in kept])
            options = stack.options(kept)
            undo.append(partial(_configure, stack.config, {key: _option(stack.config, key) for key in options}))
            _configure(stack.config, options)

    def put_back() -> None:
        for one in reversed(undo):
            one()

    return put_back


def _stacks(component: nn.Module) -> Iterator[_Stack]:
    for name, layers in component.named_modules():
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        owner, _, last = name.rpartition(".")
        config = _config(component, component.get_submodule(owner))
        for count in _COUNTS.get(last, ()) if config is not None else ():
            if _option(config, count) == len(layers):
                yield _Stack(name, layers, config, count, _pinned(layers, keep_last=config is not component))
        if _OF_UNET.fullmatch(name) and _unet_options(component):
            yield _Stack(name, layers, component, _UNET, range(len(layers) if _tied(component, owner) else 0))


def _config(component: nn.Module, owner: nn.Module) -> Optional[Any]:
    """Where options of a module are changed that are saved with the component; None if none are."""
    if _of_diffusers(component):
        return component if owner is component else None
    root, own = getattr(component, "config", None), getattr(owner, "config", None)
    saved = [root, *(getattr(root, name, None) for name in getattr(root, "sub_configs", ()))]
    return own if own is not None and any(one is own for one in saved) else None


def _of_diffusers(component: nn.Module) -> bool:
    return isinstance(getattr(component, "config", None), Mapping) and hasattr(component, "register_to_config")


def _option(config: Any, name: str) -> Any:
    options = getattr(config, "config", config)  # diffusers: the component's; transformers: the object itself
    return options.get(name) if isinstance(options, Mapping) else getattr(options, name, None)


def _configure(config: Any, options: Mapping[str, Any]) -> None:
    if isinstance(config, nn.Module):
        config.register_to_config(**options)  # type: ignore[operator]
        return
    for name, value in options.items():
        setattr(config, name, value)


def _pinned(layers: nn.ModuleList, keep_last: bool) -> set[int]:
    shapes = [[(name, tuple(one.shape)) for name, one in layer.named_parameters()] for layer in layers]
    return {number for number, own in enumerate(shapes) if shapes.count(own) == 1} | (
        {len(layers) - 1} if keep_last else set()
    )


def _fill(layers: nn.ModuleList, modules: Sequence[nn.Module]) -> None:
    layers._modules.clear()
    layers.extend(modules)
    for number, layer in enumerate(layers):
        for one in layer.modules():
            if "layer_idx" in vars(one):  # of transformers: its place in a cache
                one.layer_idx = number  # type: ignore[assignment]


def _first_linear(layer: nn.Module) -> Optional[str]:
    return next((name for name, one in layer.named_modules() if isinstance(one, nn.Linear)), None)


def _unet_options(component: Any) -> dict[str, Any]:
    """How many layers each attention of a U-Net has, as its configuration says it; nothing for any other component."""
    given = _option(component, _UNET) if _of_diffusers(component) else None
    if given is None or not hasattr(component, "mid_block"):
        return {}
    down, mid, up = component.down_blocks, component.mid_block, component.up_blocks
    given = [given] * len(down) if isinstance(given, int) else list(given)
    given_up = _option(component, _UNET_UP) or given[::-1]
    found = [_counts(block, one) for block, one in zip(down, given, strict=True)]
    if not _counts(down[-1], None):  # then the last entry counts those of the middle alone
        found[-1] = _counts(mid, found[-1])
    return {_UNET: found, _UNET_UP: [_counts(block, one) for block, one in zip(up, given_up, strict=True)]}


def _counts(block: Any, otherwise: Any) -> Any:
    attentions = getattr(block, "attentions", None) or []
    counts = [len(one.transformer_blocks) for one in attentions if hasattr(one, "transformer_blocks")]
    return counts or otherwise


def _tied(component: Any, attention: str) -> bool:
    """Whether one entry of the configuration counts the layers of this attention of a U-Net and of another one."""
    last = len(component.down_blocks) - 1
    return bool(_counts(component.down_blocks[last], None)) and attention in (
        "mid_block.attentions.0", f"down_blocks.{last}.attentions.0",
    )  # fmt: skip
