"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily


class StableDiffusionXL(DiffusersFamily):
    """A diffusers `StableDiffusionXLPipeline`: two text encoders and a U-Net. Nothing is watermarked.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "StableDiffusionXLPipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("CLIPTextModel",)),
        "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
        "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "unet": ("diffusers", ("UNet2DConditionModel",)),
        "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    }
    options: ClassVar = {"add_watermarker": False}
    idle: ClassVar = {"text_encoder": ("encoder.layers.{last}.*", "text_model.encoder.layers.{last}.*")}

    def __init__(self, model: str = "stabilityai/stable-diffusion-xl-base-1.0", **kwargs: Any):
        super().__init__(model, **kwargs)
