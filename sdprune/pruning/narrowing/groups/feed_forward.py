"""Neurons of feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from torch import nn

from sdprune.pruning.narrowing.groups.base import Group, Grouping, Slice

_LAYERS = (
    (("fc1",), "fc2"), (("wi",), "wo"), (("wi_0", "wi_1"), "wo"), (("gate_proj", "up_proj"), "down_proj"),
)  # fmt: skip
"""The layers that make neurons, with their gates, and the one that reads them: CLIP, T5, gated T5, Qwen and LLaMA."""
_MULTIPLE = 8


class FeedForwardNeurons(Grouping):
    """Hidden neurons: rows of the first layer, of a gated one those of value and gate, and columns of the second."""

    kind = "neurons"

    def find(self, name: str, module: nn.Module) -> Optional[Group]:  # noqa: D102
        net = getattr(module, "net", None)
        if isinstance(net, (nn.ModuleList, nn.Sequential)) and len(net):  # of diffusers
            read = [number for number, one in enumerate(net) if number and isinstance(one, nn.Linear)]
            if isinstance(getattr(net[0], "proj", None), nn.Linear) and len(read) == 1:
                return _group(name, module, ["net.0.proj"], f"net.{read[0]}")
        for first, second in _LAYERS:
            if all(isinstance(getattr(module, one, None), nn.Linear) for one in (*first, second)):
                return _group(name, module, first, second)
        return None


def _group(name: str, module: nn.Module, first: Sequence[str], second: str) -> Optional[Group]:
    """The group, if the first layers make each neuron once, or as value and gate one behind the other."""
    layers: dict[str, Any] = {one: module.get_submodule(one) for one in (*first, second)}
    rows, units = {layers[one].out_features for one in first}, layers[second].in_features
    if not rows <= {units, 2 * units} or len(rows) != 1:
        return None
    offsets = range(0, rows.pop(), units)
    made = tuple(Slice(one, offset) for one in first for offset in offsets)
    return Group("neurons", name, module, units, made, (Slice(second),), multiple=_MULTIPLE)
