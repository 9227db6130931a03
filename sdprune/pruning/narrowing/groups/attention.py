"""Attention heads."""

from __future__ import annotations

from typing import Any, Optional

from torch import nn

from sdprune.pruning.narrowing.groups.base import Group, Grouping, Slice

_LAYERS = (
    (("to_q", "to_k", "to_v"), "to_out.0", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
    (("q_proj", "k_proj", "v_proj"), "out_proj", (), ""),
)
"""Queries, keys and values, and the output, as diffusers and transformers name them; the same of a second stream of
tokens, as in the joint attention of diffusion transformers."""
_COUNTS = ("heads", "num_heads")
_WIDTHS = ("inner_dim", "inner_kv_dim")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class AttentionHeads(Grouping):
    """Heads of an attention whose queries, keys and values have equally many: rows of these, columns of the output.

    Whole heads, since attention is scaled by their width.
    """

    kind = "heads"

    def find(self, name: str, module: nn.Module) -> Optional[Group]:  # noqa: D102
        heads = next((one for key in _COUNTS if isinstance(one := getattr(module, key, None), int)), 0)
        for made, read, more, last in _LAYERS:
            joint = [one for one in more if _linear(module, one)]
            if not heads or not all(_linear(module, one) for one in (*made, read)) or len(joint) not in (0, len(more)):
                continue
            makers, readers = [*made, *joint], [read, *([last] if joint and _linear(module, last) else [])]
            widths = {layer.out_features for one in makers if (layer := _linear(module, one))}
            widths |= {layer.in_features for one in readers if (layer := _linear(module, one))}
            width = max(widths)
            if len(widths) > 1 or width % heads or _mixes_heads(module, width):
                continue
            counts = {one: 1 for one in _COUNTS if hasattr(module, one)}
            counts |= {one: width // heads for one in _WIDTHS if getattr(module, one, None) == width}
            outputs, inputs = (tuple(Slice(one, 0, width // heads) for one in part) for part in (makers, readers))
            return Group("heads", name, module, heads, outputs, inputs, counts=counts)
        return None


def _linear(module: Any, path: str) -> Optional[nn.Linear]:
    """A layer of a module, if it has it."""
    for part in path.split("."):
        module = getattr(module, "_modules", {}).get(part)
    return module if isinstance(module, nn.Linear) else None


def _mixes_heads(module: nn.Module, width: int) -> bool:
    """Whether a norm of queries or keys goes over all heads."""
    norms = (getattr(module, one, None) for one in _NORMS)
    return any(norm is not None and any(len(one) == width for one in norm.parameters()) for norm in norms)
