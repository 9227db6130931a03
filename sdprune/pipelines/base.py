"""Text-to-image pipelines of diffusers: what all families share. A family is a subclass in a file of its own."""

from __future__ import annotations

import gc
import inspect
from abc import ABC
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from sdprune.errors import InputError, unknown
from sdprune.hub import asking_hub
from sdprune.pipelines.checks import check_size, dry_run
from sdprune.pipelines.component import Component, Denoiser, TextEncoder
from sdprune.pipelines.directory import ModelDirectory, make_scheduler, require_pipeline, save_portable
from sdprune.pipelines.placement import Placement
from sdprune.pipelines.resolve import resolve
from sdprune.pipelines.sampling import Drawn, Sampling, step_of
from sdprune.schema import descendants, is_packaged

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sdprune.pipelines.trace import Proof

_SAMPLE_SIZE = 128
"""Height and width in latents of pipelines whose denoiser does not say its own."""


class DiffusersFamily(ABC):
    """A kind of diffusers pipeline. Constructing one reads nothing; only safetensors are read, no remote code is run.

    To add a family: subclass it in a new file of this folder. `pipeline` and `parts` are enough for one that is guided
    as Stable Diffusion is; the other attributes say what differs.

    Args:
        model: a hub id, a diffusers directory, or `miniature`, the small Stable Diffusion that comes with this package.
        revision: branch, tag or commit of a hub id.
        variant: file variant of a hub id or directory, e.g. fp16.
        offload: whether each component lies in the memory of the CPU while it does not compute, for models that a GPU
            has no room for as a whole; needs accelerate.
    """

    pipeline: ClassVar[str]
    """Name of the pipeline's class in diffusers."""
    parts: ClassVar[Mapping[str, tuple[str, Sequence[str]]]]
    """By component, the library and the classes of it that are loaded: tokenizers, text encoders, denoiser, `vae`."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's constructor."""
    call: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the pipeline's call, and of its `encode_prompt` where that takes them."""
    schedulers: ClassVar[Sequence[str]] = ()
    """Classes of schedulers that fit; none stands for all that sample as Stable Diffusion does."""
    scheduling: ClassVar[Mapping[str, Any]] = {}
    """Configuration that every scheduler gets, over that of the pipeline's own."""
    unconditional: ClassVar[int] = 0
    """Which of the two predictions of a guided step is the one without prompt: in one batch, or in two calls."""
    timestep: ClassVar[str] = "timestep"
    """Name of the denoiser's argument that holds the timestep; the first argument holds the latents."""
    float32_noise: ClassVar[bool] = False
    """Whether the pipeline takes its noise in float32 whatever the denoiser's dtype."""
    patch: ClassVar[int] = 1
    """Latents along a side that the denoiser reads as one: height and width are multiples of so many latents."""
    idle: ClassVar[Mapping[str, Sequence[str]]] = {}
    """By component, shell patterns of layers that no picture depends on: they are not pruned. `{last}` stands for the
    number of the last of such blocks."""

    def __init__(self, model: str, revision: str = "main", variant: Optional[str] = None, offload: bool = False):
        self.model, self.revision, self.variant, self.placement = model, revision, variant, Placement(offload)
        self._pipe: Any = None
        self._calls: dict[Sampling, int] = {}
        self.altered = False
        """Whether weights were changed since they were read; then they are read again."""

    # --- what a family may say otherwise ---------------------------------------------------------------------

    def guide(self, guidance: float, images: int) -> dict[str, Any]:
        """The arguments of the pipeline's call that guide it.

        Args:
            guidance: classifier-free guidance scale (Ho & Salimans 2022, eq. 6); 1 or less is none.
            images: how many are drawn in the call.
        """
        return {"guidance_scale": guidance}

    def guided(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """The guided prediction, of predictions [items, ...]."""
        return without + guidance * (with_prompt - without)

    def rows(self, layer: str, arguments: Mapping[str, Any]) -> Optional[Sequence[int]]:
        """How many rows each item of a call has in a layer of the denoiser that sees the items one behind the other.

        Args:
            layer: its name.
            arguments: of the denoiser's call, by name.

        Returns:
            None for a layer whose inputs are [items, ...], which is the rule.
        """
        return None

    # --- files -----------------------------------------------------------------------------------------------

    @cached_property
    def files(self) -> ModelDirectory:
        """The model's files; a hub id is downloaded, or found in the hub's cache, first.

        Raises:
            InputError: neither a directory of such a pipeline nor a hub id that can be had.
        """
        path = self._directory() or self._download()
        return ModelDirectory(path, self.parts, self._pipelines, self.variant, self.schedulers, self._may_lack)

    @cached_property
    def proof(self) -> Proof:
        """What can be said of its pictures whatever the weights are, from the configurations alone."""
        from sdprune.pipelines.trace import prove

        return prove(self)

    def _may_lack(self, name: str) -> tuple[Collection[str], Collection[str], str]:
        return self.proof.unread.get(name, ()), self.proof.timed if name == self.denoiser else (), self.timestep

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
    def own_steps(self) -> int:
        """Denoising steps that the pipeline of diffusers takes by default."""
        steps: int = _defaults(self._class.__call__)["num_inference_steps"]
        return steps

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

        Altered ones are released first: two models may not fit into memory.

        Raises:
            InputError: no such model, or one without safetensors; a device that it cannot be offloaded from.
        """
        import torch

        self.placement.check(device)
        if self.altered:
            self.unload()
        if self._pipe is None:
            with torch.inference_mode(False):  # weights that can be changed later
                self._pipe = self.assembled(lambda name: self.files.load(name, dtype))
        self.placement.place(self._pipe, dtype, device)

    def bring(self, name: str) -> nn.Module:
        """A component, which lies where it computes until something else runs; alone where components are offloaded."""
        return self.placement.bring(self._pipe, name)

    def unload(self) -> None:
        """Forget the weights, and free their memory."""
        self._pipe, self.altered = None, False
        gc.collect()  # modules that have run may refer to themselves

    def assembled(self, module: Callable[[str], nn.Module], **overrides: Any) -> Any:
        """The pipeline.

        Args:
            module: makes the module of a name.
            overrides: attributes of the pipeline's class to be replaced.
        """
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()
        modules = {name: module(name) for name in self.parts if name not in self._tokenizer_names}
        tokenizers = {name: self.files.tokenizer(name) for name in self._tokenizer_names}
        parts = {**modules, **tokenizers, "scheduler": self.files.scheduler()}
        taken = inspect.signature(self._class.__init__).parameters
        kept = {name: value for name, value in self.files.index.items() if name in taken and isinstance(value, bool)}
        cls = type(self._class.__name__, (self._class,), overrides) if overrides else self._class
        pipe = cls(**{**kept, **self.options, **parts})
        pipe.set_progress_bar_config(disable=True)
        for one in modules.values():
            one.eval().requires_grad_(False)
        return pipe

    def check(self, sampling: Sampling) -> None:
        """Raise InputError when images cannot be drawn so, e.g. for an unknown scheduler; loads nothing."""
        self.calls(sampling)

    def calls(self, sampling: Sampling) -> int:
        """How often the denoiser is called for one batch: some schedulers and kinds of guidance call it twice a step.

        Raises:
            InputError: images cannot be drawn so.
        """
        if sampling not in self._calls:
            self._calls[sampling] = dry_run(self, sampling).calls
        return self._calls[sampling]

    # --- running ---------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], guidance: float = 1.0) -> list[Tensor]:
        """Run the text encoders alone, one after another, as generation does.

        Args:
            prompts: one an item.
            guidance: as in sampling; guided, the empty or negative prompt of each item is encoded too.

        Returns:
            What the denoiser reads of them, [b, ...] each.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pipe, guide = self._pipe, self.guide(guidance, len(prompts))
        taken = inspect.signature(pipe.encode_prompt).parameters
        wanted = {
            **_defaults(pipe.__call__), **self.call, **guide, "prompt": list(prompts),
            "device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guidance > 1,
        }  # fmt: skip
        runs = [wanted]
        if guidance > 1 and guide.get("negative_prompt") and "negative_prompt" not in taken:
            runs.append({**wanted, "prompt": guide["negative_prompt"]})  # such a pipeline encodes it by a second call
        found: list[Any] = []
        with torch.no_grad(), self.placement.running(pipe):
            for run in runs:
                found += pipe.encode_prompt(**{name: value for name, value in run.items() if name in taken})
        lists = [pad_sequence(one, batch_first=True) for one in found if isinstance(one, list) and one]
        tensors = [one for one in found if isinstance(one, torch.Tensor)]
        return [one for one in [*lists, *tensors] if one.is_floating_point() and len(one) == len(prompts)]

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
            nonlocal finite
            finite = finite & latents.isfinite().flatten(1).all(1).cpu()
            if before_step is not None and call < len(timesteps):
                before_step(step_of(timesteps, call, sampling.steps))

        if before_step is not None:
            before_step(0)
        scheduler = self.new_scheduler(self._pipe.scheduler, sampling, after)
        output = self.draw(self._pipe, scheduler, prompts, seeds, sampling, "pt" if decode else "latent")
        if not decode:
            return Drawn(output, finite.tolist())
        pixels = output.float()
        finite = finite & pixels.isfinite().flatten(1).all(1).cpu()
        images = (pixels.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        return Drawn(images, finite.tolist())

    def draw(
        self, pipe: Any, scheduler: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling,
        output_type: str,
    ) -> Tensor:  # fmt: skip
        """Call the pipeline.

        Args:
            pipe: the loaded one, or one without weights.
            scheduler: a new one; see `new_scheduler`.
            prompts: one an image.
            seeds: one an image.
            sampling: how.
            output_type: `pt` or `latent`.
        """
        import torch

        denoiser, own, scale = getattr(pipe, self.denoiser), pipe.scheduler, pipe.vae_scale_factor
        height, width = check_size(self, sampling, denoiser.config.get("sample_size") or _SAMPLE_SIZE, scale)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        packed = hasattr(pipe, "_pack_latents")
        channels = denoiser.config.in_channels // (4 if packed else 1)
        shape = (channels, height // scale, width // scale)
        # fp32 noise on the CPU is the same whatever the model's dtype and device.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        if packed:
            noise = pipe._pack_latents(noise, len(noise), *shape)
        pipe.scheduler = scheduler
        try:
            with self.placement.running(pipe):
                return pipe(
                    prompt=list(prompts), height=height, width=width, num_inference_steps=sampling.steps,
                    latents=noise.to(pipe._execution_device, torch.float32 if self.float32_noise else denoiser.dtype),
                    generator=generators, output_type=output_type, **self.guide(sampling.guidance, len(prompts)),
                    **self.call,
                ).images  # fmt: skip
        finally:
            pipe.scheduler = own

    def new_scheduler(self, own: Any, sampling: Sampling, after: Callable[[Tensor, int, Tensor], None]) -> Any:
        """The scheduler of a run, built anew, so that no state outlives a batch.

        Args:
            own: the pipeline's.
            sampling: names it, unless it is the pipeline's own.
            after: called after each step with the latents, the number of calls so far and all timesteps.
        """
        scheduler = make_scheduler(sampling.scheduler or type(own).__name__, own, self.schedulers, self.scheduling)
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
        save_portable(self._pipe, directory)


def families() -> dict[str, type[DiffusersFamily]]:
    """The known families by the classes of their pipelines; those of this package go before a user's own."""
    known = sorted(descendants(DiffusersFamily), key=is_packaged)
    return {cls.pipeline: cls for cls in known if hasattr(cls, "pipeline")}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The default values of a function's parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}
