"""Attention heads."""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from sdprune.pruning.narrowing.groups.base import Group, Grouping, Slice

_LAYERS = (("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj"))
"""Queries, keys, values and output, as diffusers and transformers name them."""
_COUNTS = ("heads", "num_heads")
_WIDTHS = ("inner_dim", "inner_kv_dim")


class AttentionHeads(Grouping):
    """Heads of an attention whose queries, keys and values have equally many: rows of these, columns of the output.

    Whole heads, since attention is scaled by their width.
    """

    kind = "heads"

    def find(self, name: str, module: nn.Module) -> Optional[Group]:  # noqa: D102
        for names in _LAYERS:
            layers = [_layer(module, one) for one in names]
            counts = [one for one in _COUNTS if isinstance(getattr(module, one, None), int)]
            if not counts or not all(isinstance(one, nn.Linear) for one in layers):
                continue
            *made, read = layers
            heads, width = getattr(module, counts[0]), read.in_features
            if width % heads or any(one.out_features != width for one in made) or _mixes_heads(module, width):
                continue
            attributes = dict.fromkeys(counts, 1) | {
                one: width // heads for one in _WIDTHS if getattr(module, one, None) == width
            }
            slices = [Slice(one, 0, width // heads) for one in names]
            return Group("heads", name, module, heads, tuple(slices[:3]), (slices[3],), counts=attributes)
        return None


def _layer(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None) if not part.isdigit() else _first(module)  # type: ignore[assignment]
    return module


def _first(module: Any) -> Any:
    return module[0] if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) else None


def _mixes_heads(module: nn.Module, width: int) -> bool:
    """Whether anything else in it is as wide as all heads: a norm over them, or queries, keys and values of a second
    stream of tokens."""
    norms = (getattr(module, one, None) for one in ("norm_q", "norm_k"))
    wide = any(one is not None and any(p.shape[0] == width for p in one.parameters()) for one in norms)
    return wide or getattr(module, "add_k_proj", None) is not None
