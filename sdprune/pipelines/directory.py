"""A diffusers directory from anywhere: it is data, and none of it is run."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sdprune.errors import InputError, unknown
from sdprune.outside import REPLACE, read_config, read_json, reading
from sdprune.pipelines.reduced import TIMESTEPS, Reduction, find_reduction, module_names
from sdprune.pruning.narrowing import fit_to_shapes, require_shapes
from sdprune.storage.compact import SUFFIX, CompactFile
from sdprune.storage.directory import unpacked

if TYPE_CHECKING:
    import torch
    from torch import nn

INDEX = "model_index.json"
Fit = Callable[["nn.Module"], object]
MayLack = Callable[[str], tuple[Collection[str], Collection[str], str]]


class ModelDirectory:
    """The files of one pipeline.

    Args:
        path: the directory.
        classes: by component, the library and the classes of it that the family knows. No others are made, whatever
            the directory names: importing by a name from outside would run code from outside.
        pipelines: see `require_pipeline`.
        variant: file variant of the weights, e.g. fp16.
        schedulers: see `scheduler_class`.
        may_lack: what the files of a component may lack of what its configuration describes: names of parameters that
            no picture depends on, names of Linear layers that see the timestep alone, and the argument that holds it.

    Raises:
        InputError: it is no directory of such a pipeline.
    """

    def __init__(
        self, path: Path, classes: Mapping[str, tuple[str, Sequence[str]]], pipelines: Mapping[str, str],
        variant: str | None = None, schedulers: Sequence[str] = (), may_lack: MayLack = lambda _: ((), (), ""),
    ) -> None:  # fmt: skip
        self.path, self.classes, self.variant, self.schedulers = path, classes, variant, schedulers
        self.may_lack = may_lack
        self.narrowed: set[str] = set()
        """Components that were looked at, and lack units that their configurations have."""
        if not (path / INDEX).is_file():
            raise InputError(f"{path} is no diffusers directory: it has no {INDEX}.")
        self.index = read_json(path / INDEX)
        require_pipeline(str(path), self.index, pipelines)
        for name in (*classes, "scheduler"):
            self._require_component(name)

    def _require_component(self, name: str) -> None:
        entry = self.index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise InputError(
                f"{self.path / INDEX} is damaged: it has {entry!r} for {name}, expected a library and a class. "
                + REPLACE
            )
        library: str
        choices: Sequence[str]
        if name == "scheduler":
            cls = scheduler_class(entry[1], self.schedulers, f"scheduler of {self.path}")
            library, choices = "diffusers", (cls.__name__,)
        else:
            library, choices = self.classes[name]
        if entry[0] != library or entry[1] not in choices:
            known = " or ".join(f"{library}.{choice}" for choice in choices)
            raise InputError(
                f"{self.path / INDEX} has {'.'.join(entry)!r} for {name}, which is not supported. Give a model with "
                f"{known}; no other code is run."
            )
        if not (self.path / name).is_dir():
            raise InputError(f"{self.path} is no whole diffusers directory: {name}/ of its {INDEX} is missing.")

    @property
    def unused(self) -> list[str]:
        """Components that the directory has and the family neither loads nor saves, such as a safety checker."""
        entries = {name: entry for name, entry in self.index.items() if isinstance(entry, list) and any(entry)}
        return sorted(set(entries) - {*self.classes, "scheduler"})

    def type_of(self, name: str) -> Any:
        """The class of a component, one of those that the family knows."""
        import diffusers
        import transformers

        return getattr({"diffusers": diffusers, "transformers": transformers}[self.index[name][0]], self.index[name][1])

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        Raises:
            InputError: it is damaged, or has numbers that no model has.
        """
        values = read_config(self.path / name / file, infinite=name == "scheduler")
        if self.index[name][0] == "diffusers" and not isinstance(values.get("_class_name"), str):
            raise InputError(f"{self.path / name / file} is damaged: it names no class. {REPLACE}")
        return values

    def meta_module(self, name: str) -> nn.Module:
        """A component without weights, in float32 on the meta device.

        Raises:
            InputError: its configuration is damaged, or describes far more parameters than its files hold.
        """
        return self._checked(name)[0]

    def _checked(self, name: str) -> tuple[nn.Module, Optional[Fit]]:
        shapes = self._shapes(name)
        if not shapes:
            raise InputError(f"{self.path / name} has no safetensors: only these are read. Convert the model.")
        module, fit = self._empty(name, shapes)
        described, stored = sum(one.numel() for one in module.parameters()), sum(map(prod, shapes.values()))
        if described > 2 * stored:  # loading would fill memory before it finds out
            raise InputError(
                f"{self.path / name} lacks most of its weights: its config.json describes {described:,} parameters, "
                f"its safetensors hold {stored:,}. It is damaged or belongs to another configuration. {REPLACE}"
            )
        return module, fit

    def empty_module(self, name: str, whole: bool = False) -> nn.Module:
        """The same where the weights need not be there; where they are, they say how narrow it is.

        Args:
            name: of the component.
            whole: as its configuration describes it, whatever its files hold.
        """
        return self._empty(name, {} if whole else self._shapes(name))[0]

    def _empty(self, name: str, stored: Mapping[str, Sequence[int]]) -> tuple[nn.Module, Optional[Fit]]:
        """A component without weights, and how its files differ from its configuration: narrowed, or reduced."""
        import torch

        config, cls = self.config(name), self.type_of(name)
        with self._reading(name), torch.device("meta"):
            if self.index[name][0] == "diffusers":
                module: nn.Module = cls.from_config(config)
            else:
                options = cls.config_class.from_dict(config)
                module = cls._from_config(options, attn_implementation=_attention(cls), dtype=torch.float32)
        shapes = {inside: stored[key] for key, inside in module_names(module, stored).items()}
        reduction = Reduction()
        try:
            narrowed = fit_to_shapes(module, shapes)
            if TIMESTEPS in shapes or (shapes and any(one not in shapes for one, _ in module.named_parameters())):
                reduction = find_reduction(module, shapes, self._timesteps(name, shapes), *self.may_lack(name))
                reduction.apply(module)
            if narrowed:  # else loading says what is wrong
                require_shapes(module, shapes)
                self.narrowed.add(name)
        except InputError as error:
            raise InputError(f"{self.path / name} is damaged: {error} {REPLACE}") from error

        def fit(other: nn.Module) -> None:
            fit_to_shapes(other, shapes)
            reduction.apply(other)

        return module.eval(), fit if narrowed or any(reduction) else None

    def _timesteps(self, name: str, shapes: Mapping[str, Sequence[int]]) -> list[float]:
        """Of the rows of the tables in a component's files."""
        import torch
        from safetensors import safe_open

        if TIMESTEPS not in shapes:
            return []
        with self._reading(name), unpacked(self.path / name) as directory:
            for file in sorted(directory.glob("*.safetensors")):
                with safe_open(file, framework="pt") as content:
                    if TIMESTEPS in content.keys():  # noqa: SIM118
                        found: list[float] = content.get_tensor(TIMESTEPS).view(torch.float64).tolist()
                        return found
        return []

    def _shapes(self, name: str) -> dict[str, Sequence[int]]:
        """Shapes of the tensors in the safetensors of a component, of all variants; none where there are none."""
        from safetensors import safe_open

        shapes: dict[str, Sequence[int]] = {}
        for file in sorted((self.path / name).glob("*.safetensors")):
            if file.name.endswith(SUFFIX):
                shapes |= {one.name: one.shape for one in CompactFile(file).header.tensors}
                continue
            with reading(f"{file} is damaged"), safe_open(file, framework="pt") as content:
                shapes |= {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
        return shapes

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        """A component with its weights; without this check one that its file lacks would be random without a word."""
        _, fit = self._checked(name)
        stock = self.type_of(name)
        extra = {"attn_implementation": _attention(stock)} if self.index[name][0] == "transformers" else {}
        cls = stock if fit is None else fitted_class(stock, fit)
        with self._reading(name), unpacked(self.path / name) as directory:
            module, found = cls.from_pretrained(
                directory, torch_dtype=dtype, variant=self.variant, use_safetensors=True, local_files_only=True,
                trust_remote_code=False, output_loading_info=True, **extra,
            )  # fmt: skip
        require_all_weights(str(self.path / name), found)
        module.__class__ = stock
        return module

    def tokenizer(self, name: str = "tokenizer") -> Any:
        """A tokenizer."""
        with self._reading(name):
            tokenizer = self.type_of(name).from_pretrained(
                self.path / name, local_files_only=True, trust_remote_code=False
            )
            tokenizer(["a word"], padding="max_length", truncation=True, max_length=8)
        return tokenizer

    def scheduler(self) -> Any:
        """The pipeline's own scheduler."""
        config = self.config("scheduler", "scheduler_config.json")
        with self._reading("scheduler"):
            return self.type_of("scheduler").from_config(config)

    def _reading(self, name: str) -> Any:
        return reading(f"{self.path / name} cannot be read")

    @cached_property
    def hash(self) -> str:
        """SHA-256 over weights and configurations, by relative name; model cards and reports do not count."""
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*")):
            inside = path.suffix in (".safetensors", ".json", ".txt") and path.parent != self.path
            if inside or path.name == INDEX:
                digest.update(path.relative_to(self.path).as_posix().encode())
                with reading(f"{path} is damaged"), path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _attention(cls: Any) -> str:
    """The attention that a class of transformers has by default, whatever a configuration asks for."""
    return "sdpa" if cls._supports_sdpa else "eager"


def fitted_class(stock: Any, fit: Fit) -> Any:
    """A class of models that are made to fit a file, so that the weights of narrowed and reduced models can be loaded.

    Args:
        stock: the class of diffusers or transformers; only its own code runs.
        fit: changes a model that is made.
    """

    @functools.wraps(stock.__init__)  # diffusers reads the options of a model off its signature
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        fit(self)

    return type(stock.__name__, (stock,), {"__init__": make, "__module__": stock.__module__})


def require_all_weights(where: str, found: Mapping[str, Any]) -> None:
    """See that a model has exactly the weights of its files; `found` is what `from_pretrained` reports of loading.

    Raises:
        InputError: weights that would be random, or would be left out, without a word.
    """
    surplus = {key for key in found["unexpected_keys"] if not key.endswith("position_ids")}  # of older versions
    for keys, verb in ((found["missing_keys"], "lacks"), (surplus, "has no place for")):
        if keys:
            raise InputError(
                f"{where} {verb} {len(keys)} of its weights, such as {min(keys)!r}: it is damaged or belongs to "
                f"another configuration. {REPLACE}"
            )


def require_pipeline(where: str, index: Any, pipelines: Mapping[str, str]) -> None:
    """See that a model index names a pipeline of the family.

    Args:
        where: the model, for errors.
        index: what its model_index.json holds.
        pipelines: classes of pipelines that are supported, by the name of their family; the wanted one is first.

    Raises:
        InputError: another class, and how to use that.
    """
    found = index.get("_class_name") if isinstance(index, dict) else None
    wanted = next(iter(pipelines.values()))
    if not isinstance(found, str):
        raise InputError(f"{where} is damaged: its {INDEX} names no pipeline class. {REPLACE}")
    for family, pipeline in pipelines.items():
        if found == pipeline != wanted:
            raise InputError(f"{where} is a {found!r}, not a {wanted}: use --model.pipeline={family}.")
    if found != wanted:
        choices = ", ".join(pipelines.values())
        raise InputError(f"{where} is a {found[:100]!r}, which is not supported. Choices: {choices}.")


def scheduler_class(name: str, fitting: Sequence[str] = (), kind: str = "scheduler") -> Any:
    """A scheduler of diffusers that fits a family.

    Args:
        name: of the class.
        fitting: names of those that fit; none stands for all that sample as Stable Diffusion does.
        kind: what it is, for errors.

    Raises:
        InputError: there is none of this name, or it is made for other models, such as those of flow matching.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    choices = list(fitting) or [one.name for one in KarrasDiffusionSchedulers]
    if not isinstance(cls, type) or not cls.__module__.startswith("diffusers."):
        raise unknown(kind, name, choices)
    with reading(f"Scheduler {name} cannot be used", "Choose another scheduler."):
        fits = name in fitting if fitting else hasattr(cls, "scale_model_input")  # raises where a package is missing
    if not fits:
        raise InputError(f"Scheduler {name} is made for another family of models. Choices: {', '.join(choices)}.")
    return cls


def make_scheduler(name: str, own: Any, fitting: Sequence[str] = (), options: Mapping[str, Any] = {}) -> Any:
    """A new scheduler with the configuration of the pipeline's own.

    Args:
        name: of its class.
        own: the pipeline's.
        fitting: see `scheduler_class`.
        options: over the configuration of the pipeline's own, where the class takes them.
    """
    cls = scheduler_class(name, fitting)
    shift = own.config.get("flow_shift", own.config.get("shift"))  # one thing under two names
    options = {**options, **({} if shift is None else {"flow_shift": shift, "shift": shift})}
    taken = {key: value for key, value in options.items() if key in inspect.signature(cls.__init__).parameters}
    with reading(f"Scheduler {name} cannot be used", "Choose another scheduler."):
        return cls.from_config(own.config, **taken)


def save_portable(pipe: Any, directory: Path) -> None:
    """Write a pipeline as a diffusers directory that does not say where its parts once lay."""
    pipe.save_pretrained(directory, safe_serialization=True)
    for path in (directory / INDEX, *directory.glob("*/*config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
