"""A copy of a model without what no picture depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.errors import InputError, unknown
from sdprune.files import write_json
from sdprune.inspection.model import modules_of
from sdprune.lossless.drawing import Pictures, Rows, draw, poison, recording, same, seconds
from sdprune.lossless.files import New, write_reduced, write_shards
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pipelines.reduced import TIMESTEPS, Table, module_names, whole_modules
from sdprune.pipelines.text_once import TextOnce
from sdprune.pipelines.trace import DECLARED, TRACED
from sdprune.storage.compact import SUFFIX
from sdprune.storage.container import Container
from sdprune.storage.directory import Tree, copy, making

FACTS = "lossless.json"
Removed = Mapping[str, Mapping[str, str]]
"""By component, names of modules, and how it is known that no picture depends on them."""
_DTYPES = {
    torch.float32: ("F32", torch.int32),
    torch.float16: ("F16", torch.int16),
    torch.bfloat16: ("BF16", torch.int16),
}
_ROUNDS = 3


def lossless(
    family: DiffusersFamily, out: Path, sampling: Sampling, keep: Sequence[str] = (), tables: bool = False,
    dtype: torch.dtype = torch.float32, device: torch.device = torch.device("cpu"),  # noqa: B008
) -> dict[str, Any]:  # fmt: skip
    """Write a copy of a model without what no picture depends on.

    Args:
        family: the model.
        out: a new or empty directory.
        sampling: how the pictures are drawn that are compared; of tables also what they are for.
        keep: shell patterns of modules that stay, COMPONENT or COMPONENT.MODULE.
        tables: whether layers of the denoiser that see the timestep alone become tables.
        dtype: of the weights when pictures are drawn.
        device: where they are drawn.

    Returns:
        What was done, as JSON values; they are in `lossless.json` too.

    Raises:
        InputError: nothing can go, pictures differ, an `out` that is in use or too small a disk.
    """
    tree = Tree(family.files.path)
    if any(path.name.endswith(SUFFIX) for path in tree.files):
        raise InputError(f"{family.files.path} is packed: unpack it first (sdprune unpack), and pack what comes out.")
    family.check(sampling)
    removed, timed = _find(family, keep, sampling.steps if tables else 0)
    if not timed and not any(removed.values()):
        more = (" beside what --keep names" if keep else "") + (", and no layer for a table" if tables else "")
        raise InputError(f"{family.name}: there is nothing to remove{more}. Nothing was written.")
    size = sum(path.stat().st_size for path in tree.files)
    with making(tree, out, size) as part:
        before, rows = _originals(family, removed, timed, sampling, dtype, device)
        lost = _write(family, tree, part, removed, rows)
        own = type(family)(str(part), variant=family.variant)
        own.load(dtype, device)
        after = draw(own, sampling)
        if not same(before[0], after[0]) or not (rows.rows or same(before[1], after[1])):
            raise InputError(f"Pictures of the copy of {family.name} differ from its own. Nothing was written.")
        facts = {
            "model": family.name, "family": type(family).__name__,
            "parameters": {"before": _size(modules_of(family)), "after": _size(modules_of(own))},
            "bytes": {"before": size, "after": sum(path.stat().st_size for path in Tree(part).files)},
            "removed": _removed(family, removed, lost),
            "tables": _tables(family, rows, sampling, lost, before[1], after[1]) if rows.rows else None,
            "text_once": _text_once(own, sampling, after[0]),
            "check": {
                **asdict(sampling), "pictures": len(before[0]) + len(before[1]),
                "dtype": str(dtype).removeprefix("torch."), "device": str(device), "torch": torch.__version__,
            },
        }  # fmt: skip
        write_json(part / FACTS, facts)
    return facts


def _originals(
    family: DiffusersFamily, removed: Removed, timed: Sequence[str], sampling: Sampling, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Pictures, Rows]:  # fmt: skip
    """The model's own pictures, which are the same without what is removed, and the rows of tables.

    Raises:
        InputError: they are not the same.
    """
    family.load(dtype, device)
    denoiser = family.components[family.denoiser]
    with recording(denoiser, timed, family.timestep) as rows:
        pictures = draw(family, sampling)
    rows.rows = {one: own for one, own in rows.rows.items() if len(rows.timesteps) < _linear(denoiser, one).in_features}
    poison(family.components, removed)
    if not all(map(same, pictures, draw(family, sampling))):
        raise InputError(
            f"Pictures of {family.name} change with weights that no picture should depend on: "
            f"{', '.join(_dotted(removed)[:5])}. Keep them: --keep=PATTERN. Nothing was written."
        )
    family.unload()  # two models may not fit into memory
    return pictures, rows


def _find(family: DiffusersFamily, keep: Sequence[str], steps: int) -> tuple[Removed, list[str]]:
    """Modules that can go, and layers that tables for so many steps can stand for."""
    unread: dict[str, Mapping[str, str]] = dict(family.proof.unread)
    modules = {name: family.files.meta_module(name) for name in unread}
    denoiser = modules[family.denoiser]
    if steps and any(isinstance(one, Table) for one in denoiser.modules()):
        raise InputError(f"{family.name} has tables already: give the model that it was made from, or no --tables.")
    timed = [one for one in family.proof.timed if steps]
    timed = [one for one in timed if isinstance(denoiser.get_submodule(one), nn.Linear)]
    paths = [f"{name}.{one}" for name, own in unread.items() for one in own]
    paths += [f"{family.denoiser}.{one}.weight" for one in timed]
    whole = {name: whole_modules(modules[name], own) for name, own in unread.items()}
    for pattern in keep:
        if not any(_matches(path, pattern) for path in paths):
            raise unknown("module to --keep", pattern, _dotted(whole))
    stays = {path for path in paths if any(_matches(path, pattern) for pattern in keep)}
    found: dict[str, dict[str, str]] = {}
    for name, own in unread.items():
        gone = [one for one in whole[name] if not any(path.startswith(f"{name}.{one}.") for path in stays)]
        found[name] = {
            one: DECLARED
            if any(how == DECLARED and inner.startswith(f"{one}.") for inner, how in own.items())
            else TRACED
            for one in gone
        }
    return found, [one for one in timed if f"{family.denoiser}.{one}.weight" not in stays]


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def _dotted(modules: Mapping[str, Iterable[str]]) -> list[str]:
    return [f"{name}.{one}" for name, own in modules.items() for one in own]


def _size(modules: Mapping[str, nn.Module]) -> int:
    return sum(one.numel() for module in modules.values() for one in module.parameters())


def _write(family: DiffusersFamily, tree: Tree, part: Path, removed: Removed, rows: Rows) -> dict[str, dict[str, int]]:
    """Copy the files; returns bytes of what is left out, by component and module, or layer with a table."""
    lost: dict[str, dict[str, int]] = {}
    changes: dict[Path, tuple[dict[str, list[New]], dict[str, int]]] = {}
    for name, modules in removed.items():
        folder = family.files.path / name
        stored = [one for file in folder.glob("*.safetensors") for one in Container(file).header.tensors]
        names = module_names(family.files.empty_module(name, whole=True), {one.name for one in stored})
        news, sizes = changes.setdefault(folder, ({}, {}))
        tabulated = rows.rows if name == family.denoiser else {}
        lost[name] = {}
        for one in stored:
            layer, _, kind = names[one.name].rpartition(".")
            gone = next((module for module in modules if f"{layer}.".startswith(f"{module}.")), None)
            if gone is None and layer not in tabulated:
                continue
            news[one.name], sizes[one.name] = [], one.size
            if layer in tabulated and kind == "weight":
                news[one.name] = [_tensor(one.name, torch.stack(tabulated[layer]))]
                if layer == next(iter(tabulated)):
                    timesteps = torch.tensor(rows.timesteps, dtype=torch.float64).view(torch.int64)
                    news[one.name].append(New(TIMESTEPS, "I64", timesteps.numpy()))
            key = layer if gone is None else gone
            lost[name][key] = lost[name].get(key, 0) + one.size - sum(new.data.nbytes for new in news[one.name])
    for path in tree.files:
        target, (news, sizes) = tree.inside(path, part), changes.get(path.parent, ({}, {}))
        if news and path.suffix == ".safetensors":
            write_reduced(path, target, news)
        elif news and path.name.endswith(".safetensors.index.json"):
            write_shards(path, target, news, sizes)
        else:
            copy(path, target)
    return lost


def _tensor(name: str, value: Tensor) -> New:
    dtype, bits = _DTYPES[value.dtype]
    return New(name, dtype, value.cpu().contiguous().view(bits).numpy())


def _removed(family: DiffusersFamily, removed: Removed, lost: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    found = []
    for name, own in removed.items():
        module = family.files.meta_module(name)
        for one, proof in own.items():
            found.append({
                "component": name, "module": one, "proof": proof,
                "parameters": _size({one: module.get_submodule(one)}), "bytes": lost[name].get(one, 0),
            })  # fmt: skip
    return found


def _tables(
    family: DiffusersFamily, rows: Rows, sampling: Sampling, lost: Mapping[str, Mapping[str, int]], one: Tensor,
    other: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """What tables stand for, and how far pictures in calls of another size are off."""
    denoiser = family.files.meta_module(family.denoiser)
    layers = [_linear(denoiser, name) for name in rows.rows]
    return {
        "component": family.denoiser, "layers": list(rows.rows), "timesteps": len(rows.timesteps),
        "steps": sampling.steps, "scheduler": sampling.scheduler or family.files.index["scheduler"][1],
        "parameters": sum(_size({"": layer}) - len(rows.timesteps) * layer.out_features for layer in layers),
        "bytes": sum(lost[family.denoiser].get(name, 0) for name in rows.rows),
        "rounding": float((one - other).abs().max()),
    }  # fmt: skip


def _text_once(family: DiffusersFamily, sampling: Sampling, pictures: Tensor) -> dict[str, Any] | None:
    """What it changes when the denoiser remembers what depends on the text alone."""
    layers = family.proof.text
    if not layers:
        return None
    once = TextOnce(family.components[family.denoiser], layers, family.timestep)
    equal, times = same(pictures, draw(family, sampling)[0]), []
    for _ in range(_ROUNDS):
        once.active = False
        without = seconds(family, sampling)
        once.active = True
        times.append(without / seconds(family, sampling))
    return {"layers": len(layers), "same_bits": equal, "steps": sampling.steps, "speed": median(times)}
