"""Text-to-image pipelines of diffusers: what all families share. A family is a subclass in a file of its own."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from sdprune.errors import InputError, unknown
from sdprune.hub import asking_hub
from sdprune.pipelines.checks import check_parts, check_scheduler
from sdprune.pipelines.component import Component, Denoiser, TextEncoder
from sdprune.pipelines.directory import ModelDirectory, make_scheduler, require_pipeline, save_portable
from sdprune.pipelines.resolve import resolve
from sdprune.pipelines.sampling import Drawn, Sampling, step_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class DiffusersFamily(ABC):
    """A kind of diffusers pipeline. Constructing one reads nothing; only safetensors are read, no remote code is run.

    To add a family: subclass it in a new file of this folder, with `pipeline`, `parts` and `predict`.

    Args:
        model: a hub id, a diffusers directory, or `miniature`, the small Stable Diffusion that comes with this package.
        revision: branch, tag or commit of a hub id.
        variant: file variant of a hub id or directory, e.g. fp16.
    """

    pipeline: ClassVar[str]
    """Name of the pipeline's class in diffusers."""
    parts: ClassVar[Mapping[str, tuple[str, Sequence[str]]]]
    """By component, the library and the classes of it that are loaded: tokenizers, text encoders, denoiser, `vae`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's constructor."""

    def __init__(self, model: str, revision: str = "main", variant: Optional[str] = None):
        self.model, self.revision, self.variant = model, revision, variant
        self._pipe: Any = None
        self.altered = False
        """Whether weights were changed since they were read; then they are read again."""

    @abstractmethod
    def predict(self, modules: Mapping[str, Any], tokens: Mapping[str, Tensor], latents: Tensor) -> Tensor:
        """Predict the noise in latents once, with text encoders and denoiser wired as in the pipeline.

        It is called on the meta device, where it finds sizes that do not fit each other.

        Args:
            modules: text encoders and denoiser, by name.
            tokens: by text encoder, [1, length] int64.
            latents: [1, channels, height, width].
        """

    # --- files -----------------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> ModelDirectory:
        """The model's files; a hub id is downloaded, or found in the hub's cache, first.

        Raises:
            InputError: neither a directory of such a pipeline nor a hub id that can be had.
        """
        return ModelDirectory(self._directory() or self._download(), self.parts, self._pipelines, self.variant)

    def _directory(self) -> Optional[Path]:
        """The directory that the model's name stands for; None for a hub id."""
        path = Path(resolve(self.model, "pipeline"))
        if path.is_dir():
            return path
        if path.is_file():
            raise InputError(
                f"Model {self.model!r} is one file, and a diffusers directory is needed. Convert it with diffusers: "
                f"{self.pipeline}.from_single_file(FILE).save_pretrained(DIRECTORY)."
            )
        if path.is_absolute() or self.model.startswith(".") or self.model.count("/") != 1:
            raise InputError(f"Model directory {self.model!r} does not exist: give a diffusers directory or a hub id.")
        return None

    def _download(self) -> Path:
        where = f"Model {self.model!r} at revision {self.revision!r}"
        then = f"Connect, put it there (hf download {self.model}), or give a directory: --model.pipeline.model=DIR."
        with asking_hub(where, then):
            index = self._class.load_config(self.model, revision=self.revision)
            require_pipeline(where, index, self._pipelines)  # before gigabytes come
            return Path(
                self._class.download(
                    self.model, revision=self.revision, variant=self.variant, use_safetensors=True,
                    trust_remote_code=False,
                )
            )  # fmt: skip

    @property
    def _pipelines(self) -> dict[str, str]:
        """Pipeline classes of all families by the families' names, the own one first."""
        return {cls.__name__: cls.pipeline for cls in (type(self), *DiffusersFamily.__subclasses__())}

    @property
    def _class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline)

    def describe(self) -> dict[str, Any]:
        """Family, and model id with its resolved revision or a hash of its files: for identities, without loading."""
        path, facts = self.files.path, {"class": type(self).__name__, "variant": self.variant}
        if path.parent.name == "snapshots":
            return {**facts, "model": self.model, "revision": path.name}
        return {**facts, "files": self.files.hash}

    @property
    def name(self) -> str:
        """The hub id, or the name of the directory; decides no fingerprint."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model

    @property
    def unused(self) -> list[str]:
        """Names of the model's components that are neither loaded nor saved, such as a safety checker."""
        return self.files.unused

    # --- components ------------------------------------------------------------------------------------------

    @cached_property
    def prunable(self) -> dict[str, Component]:
        """The components that turn text into latents, by name, text encoders first.

        A directory that cannot be used is reported before a wrong name; without a request to the hub.
        """
        if self._directory() is not None:
            _ = self.files
        found: dict[str, Component] = {name: TextEncoder(self, name) for name in self.parts if "text_encoder" in name}
        return found | {name: Denoiser(self, name) for name in self.parts if name in ("unet", "transformer")}

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts noise."""
        return next(name for name, component in self.prunable.items() if component.role == "denoiser")

    def require(self, names: Sequence[str]) -> None:
        """Raise InputError for a name that is no prunable component."""
        for name in names:
            if name not in self.prunable:
                raise unknown("component", name, self.prunable)

    def meta_module(self, name: str) -> nn.Module:
        """A component without weights, on the meta device: its layers can be looked at before anything is loaded."""
        return self.files.meta_module(name)

    @property
    def components(self) -> dict[str, nn.Module]:
        """Every module of the loaded pipeline, by name."""
        from torch import nn

        return {name: part for name, part in self._pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def pipe(self) -> Any:
        """The loaded pipeline of diffusers."""
        return self._pipe

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers of the loaded pipeline, by name."""
        return {name: part for name, part in self._pipe.components.items() if name in self._tokenizer_names}

    @property
    def _tokenizer_names(self) -> list[str]:
        return [name for name in self.parts if name.startswith("tokenizer")]

    # --- loading ---------------------------------------------------------------------------------------------

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Read the weights, unless they are there as they were read; then only move them.

        Raises:
            InputError: no such model, or one without safetensors.
        """
        import torch

        if self._pipe is None or self.altered:
            with torch.inference_mode(False):  # weights that can be changed later
                self._pipe = self._read(dtype)
            self._scheduler, self.altered = self._pipe.scheduler, False
        self._pipe.to(device=device, dtype=dtype)

    def _read(self, dtype: torch.dtype) -> Any:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()
        modules = {name: self.files.load(name, dtype) for name in self.parts if name not in self._tokenizer_names}
        tokenizers = {name: self.files.tokenizer(name) for name in self._tokenizer_names}
        parts = {**modules, **tokenizers, "scheduler": self.files.scheduler()}
        taken = inspect.signature(self._class.__init__).parameters
        kept = {name: value for name, value in self.files.index.items() if name in taken and isinstance(value, bool)}
        pipe = self._class(**{**kept, **self.options, **parts})
        pipe.set_progress_bar_config(disable=True)
        for module in modules.values():
            module.eval().requires_grad_(False)
        return pipe

    def check(self, sampling: Sampling) -> None:
        """Raise InputError when images cannot be drawn so, e.g. for an unknown scheduler; loads nothing."""
        check_scheduler(self.files, sampling)
        check_parts(self, sampling)

    # --- running ---------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Run the text encoders alone, one after another, as in generation without guidance.

        Returns:
            What the denoiser reads of them, [b, ...] each.
        """
        import torch

        wanted = {
            "prompt": list(prompts), "device": self._pipe.device, "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }  # fmt: skip
        taken = inspect.signature(self._pipe.encode_prompt).parameters
        with torch.no_grad():
            found = self._pipe.encode_prompt(**{name: value for name, value in wanted.items() if name in taken})
        return [one for one in found if isinstance(one, torch.Tensor)]

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, decode: bool = True,
        before_step: Optional[Callable[[int], None]] = None,
    ) -> Drawn:  # fmt: skip
        """Draw one image a prompt, from noise that depends on nothing but its seed.

        Args:
            prompts: one an image.
            seeds: one an image.
            sampling: how.
            decode: whether latents become pictures.
            before_step: called before each call of the denoiser with the number of its step, from 0 to steps - 1; some
                schedulers call it several times a step.
        """
        import torch

        finite = torch.ones(len(prompts), dtype=torch.bool)

        def after(latents: Tensor, call: int, timesteps: Tensor) -> None:
            finite.logical_and_(latents.isfinite().flatten(1).all(1).cpu())
            if before_step is not None and call < len(timesteps):
                before_step(step_of(timesteps, call, sampling.steps))

        if before_step is not None:
            before_step(0)
        pipe = self._pipe
        pipe.scheduler = self._new_scheduler(sampling, after)
        denoiser = getattr(pipe, self.denoiser)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        scale = pipe.vae_scale_factor
        height, width = (side or denoiser.config.sample_size * scale for side in sampling.size)
        shape = (denoiser.config.in_channels, height // scale, width // scale)
        # fp32 noise on the CPU is the same whatever the model's dtype and device.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        output = pipe(
            list(prompts), height=height, width=width, num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance, latents=noise.to(pipe.device, denoiser.dtype), generator=generators,
            output_type="pt" if decode else "latent",
        ).images  # fmt: skip
        if not decode:
            return Drawn(output, finite.tolist())
        pixels = output.float()
        finite.logical_and_(pixels.isfinite().flatten(1).all(1).cpu())
        images = (pixels.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        return Drawn(images, finite.tolist())

    def _new_scheduler(self, sampling: Sampling, after: Callable[[Tensor, int, Tensor], None]) -> Any:
        """The scheduler of a run, built anew, so that no state outlives a batch.

        Args:
            sampling: names it, unless it is the pipeline's own.
            after: called after each step with the latents, the number of calls so far and all timesteps.
        """
        own = self._scheduler
        scheduler = make_scheduler(sampling.scheduler or type(own).__name__, own)
        step, calls = scheduler.step, 0

        @wraps(step)  # pipelines look at its signature
        def observed(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            result = step(*args, **kwargs)
            calls += 1
            after(result[0], calls, scheduler.timesteps)
            return result

        scheduler.step = observed
        return scheduler

    def save(self, directory: Path) -> None:
        """Write a plain diffusers directory."""
        self._pipe.scheduler = self._scheduler  # not the one that images were drawn with
        save_portable(self._pipe, directory)
