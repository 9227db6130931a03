"""The blocks of a component, read off its structure: allocations, granularities and sequential order go by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from torch import nn

Blocks = Literal["module", "transformer"]
STEM = "stem"
"""The block of what lies outside of all others."""


def block_names(component: nn.Module, blocks: Blocks = "module") -> list[str]:
    """Names of the modules that are blocks, outer ones before those inside them.

    A block is an element of the outermost lists of modules: `encoder.layers.3`, `down_blocks.0`. A module beside these
    lists that has lists of its own is a block too: a U-Net's `mid_block`. A component without any `ModuleList` is read
    by its `Sequential`s, its own numbers apart.

    Args:
        component: any module.
        blocks: `transformer` cuts blocks further, down to transformer blocks and whatever else is numbered beside them:
            `down_blocks.0.attentions.1.transformer_blocks.0`, `mid_block.resnets.0`.
    """
    kind = nn.ModuleList if any(isinstance(one, nn.ModuleList) for one in component.modules()) else nn.Sequential
    return list(_blocks(component, "", kind, blocks == "transformer"))


def block_of(component: nn.Module, blocks: Blocks = "module") -> Callable[[str], str]:
    """A function that maps the name of a layer of the component to the name of its innermost block."""
    names = set(block_names(component, blocks))

    def find(layer: str) -> str:
        while layer and layer not in names:
            layer = layer.rpartition(".")[0]
        return layer or STEM

    return find


def _blocks(module: nn.Module, prefix: str, kind: type[nn.Module], fine: bool) -> Iterator[str]:
    lists = [child for child in module.children() if isinstance(child, kind) and len(list(child.children()))]
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not lists:
            yield from _blocks(child, f"{path}.", kind, fine)
            continue
        found = [(f"{path}.{number}", one) for number, one in child.named_children()] if child in lists else []
        if not found and any(isinstance(one, kind) for one in child.modules()):
            found = [(path, child)]
        for block, one in found:
            yield block
            if fine and "TransformerBlock" not in type(one).__name__:
                yield from _blocks(one, f"{block}.", kind, fine)
