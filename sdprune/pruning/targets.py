"""Which weights of a component can be pruned, each as a matrix, with the block it belongs to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Optional, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from sdprune.errors import InputError, unknown
from sdprune.pruning.blocks import Blocks, block_of
from sdprune.pruning.memory import region

LAYER_KINDS = ("Linear", "Conv2d", "Conv1D")


@dataclass(frozen=True)
class Target:
    """One prunable layer of a component, or several that share one weight."""

    name: str
    module: nn.Module
    block: str
    tied: tuple[tuple[str, nn.Module], ...] = ()
    """Further layers with the very same weight, by name; a module that has two names is here too."""

    @property
    def names(self) -> list[str]:
        """All names of the weight's layers, first to last."""
        return [self.name, *(name for name, _ in self.tied)]

    @property
    def by_module(self) -> "list[Target]":
        """The target seen from each module that uses its weight: inputs differ, and so may a convolution's stride."""
        modules = {id(module): module for module in (self.module, *(module for _, module in self.tied))}
        return [replace(self, module=module) for module in modules.values()]

    @property
    def weight(self) -> nn.Parameter:
        """The layer's own weight, in its own shape."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def _by_output(self) -> Tensor:
        """The weight with the outputs first, as a view."""
        weight = self.weight.detach()
        return weight.T if self.kind == "Conv1D" else weight

    @property
    def matrix(self) -> Tensor:
        """The weight as [rows = outputs, columns = inputs]; a convolution's columns are in/groups * kh * kw."""
        return self.rows(slice(None))

    def rows(self, rows: slice) -> Tensor:
        """Some rows of the matrix."""
        return self._by_output[rows].flatten(1)

    @torch.no_grad()
    def write(self, mask: Tensor, weight: Optional[Tensor] = None) -> None:
        """Set what the mask covers to 0, and the rest to a new weight if there is one; both [rows, columns]."""
        stored = self._by_output
        if weight is not None:
            stored.copy_(weight.view(stored.shape))
        stored.masked_fill_(mask.view(stored.shape), 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        shape = self._by_output.shape
        return shape[0], shape[1:].numel()

    @property
    def groups(self) -> int:
        """Groups of a grouped convolution: each has its own inputs. 1 otherwise."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's inputs, out of the arguments of a call; one image of a convolution as a batch of one.

        Raises:
            InputError: they do not fit the weight.
        """
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, Tensor):
            raise InputError(f"Layer {self.name!r} sees a {type(inputs).__name__}: give inputs that are tensors.")
        conv = self.kind == "Conv2d"
        batch = inputs[None] if conv and inputs.dim() == 3 else inputs
        axis, width = (1, self.channels * self.groups) if conv else (-1, self.shape[1])
        if batch.dim() < (4 if conv else 1) or batch.shape[axis] != width:
            raise InputError(
                f"Layer {self.name!r} sees inputs of shape {list(inputs.shape)}, but has {width} inputs: give the "
                "module inputs of the shape that it was made for."
            )
        return batch

    def columns(self, inputs: Tensor) -> Tensor:
        """What the matrix is multiplied with: the layer's inputs as [groups, positions, columns].

        Args:
            inputs: of a Linear or Conv1D [..., columns]; of a convolution [items, channels, height, width], whose
                columns are unfolded with its kernel, stride, padding and dilation.
        """
        if not isinstance(self.module, nn.Conv2d):
            return inputs.reshape(1, -1, inputs.shape[-1])
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = functional.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
        # [items, groups * columns, positions]
        unfolded = functional.unfold(padded, cast(tuple[int, int], conv.kernel_size), conv.dilation, 0, conv.stride)
        return unfolded.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    @property
    def channels(self) -> int:
        """Input channels of one group: columns at one position of the kernel."""
        return self._by_output.shape[1]

    @property
    def channels_last(self) -> Tensor:
        """The columns in another order: kernel position by kernel position, channels neighbouring. N:M runs so."""
        columns = torch.arange(self.shape[1], device=self.weight.device)
        return columns.view(self.channels, -1).T.flatten()

    def by_row(self, statistic: Tensor, rows: slice = slice(None)) -> Tensor:
        """A statistic [groups, columns] as [columns], or of a grouped convolution as [rows, columns]."""
        if self.groups == 1:
            return statistic[0]
        return statistic.repeat_interleave(self.shape[0] // self.groups, 0)[rows]

    @property
    def kind(self) -> str:
        """`Linear`, `Conv2d` or `Conv1D`, also for subclasses of these."""
        return str(layer_kind(self.module))


def find_targets(
    component: nn.Module,
    layers: Sequence[str] = ("Linear",),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    blocks: Blocks = "module",
) -> list[Target]:
    """The component's layers of the given kinds, in module order, each weight once.

    Args:
        component: a text encoder, a U-Net or any other module.
        layers: kinds of layer: `Linear`, `Conv2d`, and `Conv1D`, the Linear layer of GPT-2 in transformers, whose
            weight is transposed.
        include: shell patterns on dotted module names; a layer that matches one of them is a target ...
        exclude: ... unless it matches one of these. Layers that share a weight are one target: it is included, or
            excluded, under any of their names.
        blocks: what counts as a block, see `block_names`.

    Raises:
        InputError: for an unknown kind, a pattern that matches no layer, or when no target is left.
    """
    if not isinstance(component, nn.Module):
        raise InputError(f"A {type(component).__name__} is no module: give a torch.nn.Module, as in pipe.unet.")
    candidates = _layers(component, layers, blocks)
    if not candidates:
        raise InputError(
            f"{type(component).__name__} has no {' or '.join(layers) or 'chosen'} layer: choose other layers"
            f"{_other_kinds(component, layers)}."
        )
    names = [name for target in candidates for name in target.names]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            check_pattern(option, pattern, names)
    targets = [target for target in candidates if matches(target.names, include) and not matches(target.names, exclude)]
    if not targets:
        raise InputError(
            f"No layer is left to prune: include {list(include)} minus exclude {list(exclude)} is empty, "
            f"of {len(candidates)} layers such as {candidates[0].name!r}. Widen include or shorten exclude"
            f"{_other_kinds(component, layers)}."
        )
    return targets


def by_block(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """The targets of each block, in the order of their first."""
    blocks: dict[str, list[Target]] = {}
    for target in targets:
        blocks.setdefault(target.block, []).append(target)
    return blocks


def layer_kind(module: nn.Module) -> Optional[str]:
    """Which of LAYER_KINDS a module is, if any; none where its weight was taken away."""
    if "weight" in module._parameters and module._parameters["weight"] is None:
        return None
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Conv2d):
        return "Conv2d"
    # By name: whoever has such a layer has imported transformers, and nobody else should have to.
    names = [(cls.__module__, cls.__name__) for cls in type(module).__mro__]
    return "Conv1D" if ("transformers.pytorch_utils", "Conv1D") in names else None


def stored_weight(module: nn.Module) -> Optional[Tensor]:
    """The weight as the module stores it; None where it is computed from others, which happens on every look at it."""
    stored = module._parameters.get("weight")
    return module._buffers.get("weight") if stored is None else stored


def _layers(component: nn.Module, kinds: Sequence[str], blocks: Blocks) -> list[Target]:
    for kind in kinds:
        if kind not in LAYER_KINDS:
            raise unknown("layer kind", kind, LAYER_KINDS)
    layers: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, module in component.named_modules(remove_duplicate=False):
        if layer_kind(module) in kinds and not _is_empty(module):
            layers.setdefault(_identity(module), []).append((name, module))
    block = block_of(component, blocks)
    return [Target(*members[0], block(members[0][0]), tuple(members[1:])) for members in layers.values()]


def _is_empty(module: nn.Module) -> bool:
    """Whether there is nothing to prune; a lazy weight has no size yet."""
    weight = stored_weight(module)
    return weight is not None and not is_lazy(weight) and not weight.numel()


def _identity(module: nn.Module) -> Any:
    """Equal for layers with the very same weight, seen in the same way."""
    weight = stored_weight(module)
    place = None if weight is None else region(weight)
    if weight is None or place is None:
        return id(module) if weight is None else id(weight)
    return place, weight.shape, weight.stride(), weight.dtype, layer_kind(module), getattr(module, "groups", 1)


def _other_kinds(component: nn.Module, kinds: Sequence[str]) -> str:
    """`; it has 12 Conv1D`, for the end of an error."""
    found = Counter(kind for module in component.modules() if (kind := layer_kind(module)) and kind not in kinds)
    return "".join(f"; it has {n} {kind}, as in layers=[{kind!r}]" for kind, n in found.items())


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether any name matches any shell pattern."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def check_pattern(option: str, pattern: str, names: list[str], what: str = "layers") -> None:
    """Raise InputError for a shell pattern that matches no name, with names that it may have meant."""
    if any(fnmatchcase(name, pattern) for name in names):
        return
    inner = pattern.strip("*.")
    close = [name for name in names if inner and inner in name] or get_close_matches(pattern, names, n=3, cutoff=0.4)
    shown = ", ".join(repr(name) for name in (close or names)[:3])
    raise InputError(
        f"{option} pattern {pattern!r} matches none of the {len(names)} {what}, which are whole dotted names "
        f"such as {shown}; use * for any part, as in '*{(inner or names[0]).rpartition('.')[2]}*'."
    )
