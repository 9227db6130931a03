"""Modules without the layers that no picture depends on, and with tables in place of layers that see the timestep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdprune.errors import InputError

TIMESTEPS = "table_timesteps"
"""Name of the tensor in a denoiser's file that holds the timesteps of its tables: float64, their bits as int64."""


class Reduction(NamedTuple):
    """What a file lacks of the module that its configuration describes."""

    removed: Sequence[str] = ()
    """Names of modules, the outermost."""
    tables: Sequence[str] = ()
    """Names of the Linear layers that are tables."""
    timesteps: Sequence[float] = ()
    """Of the rows of each table."""
    argument: str = ""
    """Of the module's call, which holds the timestep."""

    def apply(self, module: nn.Module) -> None:
        """Take it away from a module."""
        remove(module, self.removed)
        if self.tables:
            tabulate(module, self.tables, self.timesteps, self.argument)


def outermost(module: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The largest modules that hold nothing but these parameters, and what is left of the parameters."""
    left, found = set(parameters), []
    for name, one in module.named_modules():
        own = {f"{name}.{inner}".lstrip(".") for inner, _ in one.named_parameters()}
        if own and own <= left:
            found.append(name)
            left -= own
    return [*found, *sorted(left)]


def whole_modules(module: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The largest modules inside of a module that hold nothing but these parameters."""
    inside = dict(module.named_modules())
    return [name for name in outermost(module, parameters) if name and name in inside]


def remove(module: nn.Module, names: Iterable[str]) -> None:
    """Empty modules; each still gives something where it is called, its first argument."""
    for name in names:
        one = module.get_submodule(name)
        one._modules.clear()  # the object stays: libraries count modules, and find hidden states, by their classes
        one._parameters = dict.fromkeys(one._parameters)  # not gone: libraries ask whether there is a bias
        one._buffers.clear()
        one.forward = _first
        vars(one)["_is_hf_initialized"] = True  # of transformers: there is nothing to be made random


def _first(*args: Any, **kwargs: Any) -> Any:
    return next(iter([*args, *kwargs.values()]))


class Table(nn.Module):
    """Stands for a Linear layer whose input depends on the timestep alone: its outputs, one for each timestep.

    Args:
        layer: the one that it stands for.
        rows: number of timesteps.
    """

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.row = layer.in_features, layer.out_features, 0
        like = layer.weight
        self.weight = nn.Parameter(torch.zeros(rows, self.out_features, dtype=like.dtype, device=like.device), False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The row of the current timestep for each of the inputs: [..., in] to [..., out]."""
        return self.weight[self.row].expand(*inputs.shape[:-1], -1).contiguous()


def tabulate(module: nn.Module, layers: Iterable[str], timesteps: Sequence[float], argument: str) -> None:
    """Put tables in the place of layers; each call of the module then chooses their row.

    Args:
        module: the denoiser.
        layers: names of its Linear layers.
        timesteps: of the rows.
        argument: name of the argument of the module's call that holds the timestep.
    """
    tables = []
    for name in layers:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        tables.append(Table(layer, len(timesteps)))
        module.set_submodule(name, tables[-1])
    known = torch.tensor(timesteps, dtype=torch.float64, device="cpu")
    module.register_buffer(TIMESTEPS, known.view(torch.int64).to(next(module.parameters()).device))
    module.register_forward_pre_hook(partial(_choose, tuple(tables), tuple(timesteps), argument), with_kwargs=True)


def _choose(
    tables: Sequence[Table], timesteps: Sequence[float], argument: str, module: nn.Module, args: Any, kwargs: Any
) -> None:
    wanted = torch.as_tensor(signature(module.forward).bind(*args, **kwargs).arguments[argument])
    if wanted.is_meta:
        return
    known = torch.tensor(timesteps, dtype=torch.float64).to(wanted.dtype).tolist()
    values = set(wanted.flatten().tolist())
    row = known.index(*values) if len(values) == 1 and values <= set(known) else None
    if row is None:
        shown = ", ".join(f"{one:g}" for one in sorted(values)[:3])
        raise InputError(
            f"The tables of this {type(module).__name__} are made for {len(known)} timesteps from {known[0]:g} to "
            f"{known[-1]:g}, and it is called with {shown}: draw with the scheduler and the number of steps that "
            "lossless.json names, or use the model that it was made from."
        )
    for table in tables:
        table.row = row


def find_reduction(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], timesteps: Sequence[float], unread: Collection[str],
    timed: Collection[str], argument: str,
) -> Reduction:  # fmt: skip
    """What a file lacks of a module and may lack.

    Args:
        module: as its configuration makes it.
        shapes: of the tensors in the file, by their names in the module.
        timesteps: of the file's tables.
        unread: names of parameters that no picture depends on.
        timed: names of Linear layers that see the timestep alone.
        argument: see `tabulate`.
    """
    absent = {name for name, _ in module.named_parameters() if name not in shapes}
    removed = whole_modules(module, absent & set(unread))
    tables = [
        name for name, layer in module.named_modules()
        if name in timed and isinstance(layer, nn.Linear)
        and tuple(shapes.get(f"{name}.weight", ())) == (len(timesteps), layer.out_features) != layer.weight.shape
        and f"{name}.bias" not in shapes
    ]  # fmt: skip
    return Reduction(removed, tables, timesteps if tables else (), argument if tables else "")


def module_names(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """By names of tensors in a file, their names in the module: those of transformers may differ."""
    keys, state = list(keys), module.state_dict()
    if not hasattr(module, "base_model_prefix") or all(key in state for key in keys):
        return dict(zip(keys, keys, strict=True))
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(module) if isinstance(one, WeightRenaming)]
    prefix = module.base_model_prefix
    return {key: rename_source_key(key, renamings, [], prefix, state)[0] for key in keys}
