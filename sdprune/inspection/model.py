"""Finding a model, its family, and its modules on the meta device, from its configuration files alone."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Optional

from torch import nn

from sdprune.errors import InputError
from sdprune.hub import asking_hub
from sdprune.outside import read_json, reading
from sdprune.pipelines import DiffusersFamily
from sdprune.pipelines.base import families
from sdprune.pipelines.directory import INDEX
from sdprune.pipelines.resolve import resolve
from sdprune.schema import class_named

_CONFIGURATION = [INDEX, "*/*.json", "*/*.txt", "*/*.model"]


def find_family(model: str, revision: str = "main", pipeline: Optional[str] = None) -> DiffusersFamily:
    """The family of a model, by the class that its index names; of a hub id only configuration files are fetched.

    Args:
        model: a diffusers directory, a hub id, or `miniature`.
        revision: branch, tag or commit of a hub id.
        pipeline: a family by name, also one by its dotted path, instead of the first that fits.

    Raises:
        InputError: there is no such model, or none of a family that is known.
    """
    path = Path(resolve(model, "pipeline"))
    if not path.exists():
        path = _fetched(model, revision)
    if pipeline is not None:
        cls = class_named("pipeline", pipeline, [DiffusersFamily])
        return cls(str(path))
    if not (path / INDEX).is_file():
        raise InputError(f"{path} is no diffusers directory: it has no {INDEX}.")
    index = read_json(path / INDEX)
    found = index.get("_class_name") if isinstance(index, dict) else None
    known = families()
    if not isinstance(found, str) or found not in known:
        raise InputError(
            f"{path / INDEX} names {str(found)[:100]!r}, which no family is for. Give a {' or '.join(known)}, or a "
            "family of your own: --pipeline=MODULE.CLASS."
        )
    return known[found](str(path))


def _fetched(model: str, revision: str) -> Path:
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise InputError(f"Model directory {model!r} does not exist: give a diffusers directory or a hub id.")
    where = f"Model {model!r} at revision {revision!r}"
    then = f"Connect, put it there (hf download {model}), or give a directory: sdprune inspect DIR."
    with asking_hub(where, then):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the files are small
        return Path(snapshot_download(model, revision=revision, allow_patterns=_CONFIGURATION))


def modules_of(family: DiffusersFamily) -> dict[str, nn.Module]:
    """Text encoders, denoiser and VAE on the meta device, by name. Weights that lie there are checked by their size."""
    names = [*family.prunable, "vae"]
    return {
        name: family.files.meta_module(name) if stored_of(family, name) else family.files.empty_module(name)
        for name in names
    }


def stored_of(family: DiffusersFamily, name: str) -> Optional[dict[str, Any]]:
    """What the headers of a component's safetensors say, of all variants together: `bytes`, and `numbers` by dtype.

    None where there are none.
    """
    from safetensors import safe_open

    files = sorted((family.files.path / name).glob("*.safetensors"))
    numbers: Counter[str] = Counter()
    for file in files:
        with reading(f"{file} is damaged"), safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118
                part = content.get_slice(key)
                numbers[part.get_dtype()] += prod(part.get_shape())
    return {"bytes": sum(file.stat().st_size for file in files), "numbers": dict(numbers)} if files else None
