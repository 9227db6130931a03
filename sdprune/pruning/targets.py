"""Which weights of a component can be pruned, each as a matrix, with the block it belongs to."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from sdprune.errors import InputError, unknown

LAYER_KINDS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}

# The outermost numbered part, or the one block that has no number. Older text encoders wrap theirs in `text_model`.
_BLOCK = re.compile(r"(?:text_model\.)?(.*?(?:\bmid_block|\.\d+))(?=\.|$)")


@dataclass(frozen=True)
class Target:
    """One prunable layer of a component."""

    name: str
    module: nn.Module
    block: str

    @property
    def weight(self) -> nn.Parameter:
        """The layer's own weight, in its own shape."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def matrix(self) -> Tensor:
        """The weight as [rows = outputs, columns = inputs]; a convolution's columns are in/groups * kh * kw."""
        return self.weight.detach().flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return len(self.weight), self.weight[0].numel()

    @property
    def kind(self) -> str:
        """`Linear` or `Conv2d`, also for subclasses of these."""
        return next(kind for kind, cls in LAYER_KINDS.items() if isinstance(self.module, cls))


def find_targets(
    component: nn.Module,
    layers: Sequence[str] = ("Linear",),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[Target]:
    """The component's layers of the given kinds, in module order, each weight once.

    Args:
        component: a text encoder, a U-Net or any other module.
        layers: kinds of layer, of `Linear` and `Conv2d`.
        include: shell patterns on dotted module names; a layer that matches one of them is a target ...
        exclude: ... unless it matches one of these.

    Raises:
        InputError: for an unknown kind, a pattern that matches no layer, or when no target is left.
    """
    candidates = dict(_layers(component, layers))
    if not candidates:
        raise InputError(
            f"{type(component).__name__} has no {' or '.join(layers) or 'chosen'} layer: choose other layers."
        )
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            _check_pattern(option, pattern, list(candidates))
    targets = [
        Target(name, module, module_block(name))
        for name, module in candidates.items()
        if _matches(name, include) and not _matches(name, exclude)
    ]
    if not targets:
        raise InputError(
            f"No layer is left to prune: include {list(include)} minus exclude {list(exclude)} is empty, "
            f"of {len(candidates)} layers such as {next(iter(candidates))!r}. Widen include or shorten exclude."
        )
    return targets


def module_block(name: str) -> str:
    """The block a layer belongs to: `encoder.layers.3`, `down_blocks.0`, `mid_block`; outside of all blocks, `stem`."""
    found = _BLOCK.match(name)
    return found[1] if found else "stem"


def _layers(component: nn.Module, kinds: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for kind in kinds:
        if kind not in LAYER_KINDS:
            raise unknown("layer kind", kind, LAYER_KINDS)
    classes = tuple(LAYER_KINDS[kind] for kind in kinds)
    seen: set[tuple[str, int]] = set()
    for name, module in component.named_modules():
        if not isinstance(module, classes):
            continue
        weight = cast(nn.Parameter, module.weight)
        storage = weight.data_ptr()  # 0 on the meta device
        key = ("storage", storage) if storage else ("parameter", id(weight))
        if key not in seen:
            seen.add(key)
            yield name, module


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_pattern(option: str, pattern: str, names: list[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    inner = pattern.strip("*.")
    close = [name for name in names if inner and inner in name] or get_close_matches(pattern, names, n=3, cutoff=0.4)
    shown = ", ".join(repr(name) for name in (close or names)[:3])
    raise InputError(
        f"{option} pattern {pattern!r} matches none of the {len(names)} layers, which are whole dotted names "
        f"such as {shown}; use * for any part, as in '*{(inner or names[0]).rpartition('.')[2]}*'."
    )
