"""Which weights of a component can be pruned, each as a matrix, with the block it belongs to."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdprune.errors import InputError, unknown

Blocks = Literal["module", "transformer"]
LAYER_KINDS: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}

# The outermost numbered part, or the one block that has no number. Older text encoders wrap theirs in `text_model`.
_BLOCK = re.compile(r"(?:text_model\.)?(.*?(?:\bmid_block|\.\d+))(?=\.|$)")
# One step further down in a U-Net: a transformer block, or whatever else is numbered beside it.
_FINE_BLOCK = re.compile(r".*?\.transformer_blocks\.\d+(?=\.)|.*?\bmid_block\.\w+\.\d+(?=\.)|.*?\.\d+\.\w+\.\d+(?=\.)")


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
    def groups(self) -> int:
        """Groups of a grouped convolution: each has its own inputs. 1 otherwise."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    def columns(self, inputs: Tensor) -> Tensor:
        """What the matrix is multiplied with: the layer's inputs as [groups, positions, columns].

        Args:
            inputs: of a Linear [..., columns]; of a convolution [items, channels, height, width], whose columns are
                unfolded with its kernel, stride, padding and dilation.
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
        return self.weight.shape[1]

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
        """`Linear` or `Conv2d`, also for subclasses of these."""
        return next(kind for kind, cls in LAYER_KINDS.items() if isinstance(self.module, cls))


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
        layers: kinds of layer, of `Linear` and `Conv2d`.
        include: shell patterns on dotted module names; a layer that matches one of them is a target ...
        exclude: ... unless it matches one of these.
        blocks: what counts as a block, see `module_block`.

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
        Target(name, module, module_block(name, blocks))
        for name, module in candidates.items()
        if _matches(name, include) and not _matches(name, exclude)
    ]
    if not targets:
        raise InputError(
            f"No layer is left to prune: include {list(include)} minus exclude {list(exclude)} is empty, "
            f"of {len(candidates)} layers such as {next(iter(candidates))!r}. Widen include or shorten exclude."
        )
    return targets


def by_block(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """The targets of each block, in the order of their first."""
    blocks: dict[str, list[Target]] = {}
    for target in targets:
        blocks.setdefault(target.block, []).append(target)
    return blocks


def module_block(name: str, blocks: Blocks = "module") -> str:
    """The block a layer belongs to: `encoder.layers.3`, `down_blocks.0`, `mid_block`; outside of all blocks, `stem`.

    With blocks `transformer` a U-Net's blocks are cut further, into transformer blocks, resnets and samplers:
    `down_blocks.0.attentions.1.transformer_blocks.0`, `mid_block.resnets.0`.
    """
    if blocks == "transformer" and (fine := _FINE_BLOCK.match(name)):
        return fine[0]
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
        if not weight.numel():  # nothing to prune
            continue
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
