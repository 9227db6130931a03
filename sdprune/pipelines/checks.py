"""What can be found wrong with a model before its weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from sdprune.errors import InputError
from sdprune.outside import reading
from sdprune.pipelines.directory import ModelDirectory, make_scheduler
from sdprune.pipelines.sampling import Sampling

if TYPE_CHECKING:
    from sdprune.pipelines.base import DiffusersFamily


def check_scheduler(files: ModelDirectory, sampling: Sampling) -> None:
    """Take one step with zeros.

    Raises:
        InputError: the scheduler does not fit the model, or cannot take so many steps.
    """
    own = files.scheduler()
    scheduler = make_scheduler(sampling.scheduler or type(own).__name__, own)
    name = type(scheduler).__name__
    problem = f"Scheduler {name} of {files.path} cannot take {sampling.steps} steps"
    with reading(problem, "Choose another scheduler or number of steps."):
        scheduler.set_timesteps(sampling.steps)
        latents = torch.zeros(1, 4, 8, 8) * scheduler.init_noise_sigma
        scaled = scheduler.scale_model_input(latents, scheduler.timesteps[0])
        scheduler.step(scaled, scheduler.timesteps[0], latents)


def check_parts(family: DiffusersFamily, sampling: Sampling) -> None:
    """Run every part once on the meta device: sizes that do not fit each other are found without any work.

    Raises:
        InputError: what does not fit.
    """
    modules = {name: cast(Any, family.meta_module(name)) for name in (*family.prunable, "vae")}
    vae, takes = modules.pop("vae"), modules[family.denoiser].config.in_channels
    makes = vae.config.latent_channels
    if takes != makes:
        raise InputError(
            f"The denoiser of {family.files.path} takes {takes} channels and the VAE makes {makes}: this is a model "
            "for inpainting or editing, which needs a picture. Give the text-to-image model that it was made from."
        )
    with reading(f"The parts of {family.files.path} do not fit each other"):
        lengths = {name: _length(family, name, modules[name]) for name in modules if name != family.denoiser}
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        native = modules[family.denoiser].config.sample_size * scale
        height, width = ((side or native) // scale for side in sampling.size)
        with torch.device("meta"), torch.no_grad():
            tokens = {name: torch.zeros(1, length, dtype=torch.long) for name, length in lengths.items()}
            latents = torch.zeros(1, makes, height, width)
            noise = family.predict(modules, tokens, latents)
            image = vae.decode(noise).sample
        if noise.shape != latents.shape or image.shape[1] != 3:
            raise ValueError(f"latents {list(latents.shape)}, noise {list(noise.shape)}, image {list(image.shape)}")


def _length(family: DiffusersFamily, name: str, text: Any) -> int:
    """How many tokens a text encoder gets, after a look at whether it can read them."""
    tokenizer = family.files.tokenizer(name.replace("text_encoder", "tokenizer"))
    longest, largest = text.config.max_position_embeddings, max(tokenizer.get_vocab().values())
    if not 2 <= tokenizer.model_max_length <= longest or largest >= text.config.vocab_size:
        raise ValueError(
            f"the tokenizer cuts at {tokenizer.model_max_length} tokens, numbered up to {largest}; the text "
            f"encoder takes {longest}, numbered below {text.config.vocab_size}"
        )
    return int(tokenizer.model_max_length)
