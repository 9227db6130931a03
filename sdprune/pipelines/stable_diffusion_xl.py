"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch

from sdprune.pipelines.base import DiffusersFamily

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionXL(DiffusersFamily):
    """A diffusers `StableDiffusionXLPipeline`: two text encoders and a U-Net. Nothing is watermarked.

    Args:
        model: a hub id or a diffusers directory.
        revision: branch, tag or commit of a hub id.
        variant: file variant of a hub id or directory, e.g. fp16.
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

    def __init__(
        self,
        model: str = "stabilityai/stable-diffusion-xl-base-1.0",
        revision: str = "main",
        variant: Optional[str] = None,
    ):
        super().__init__(model, revision, variant)

    def predict(self, modules: Mapping[str, Any], tokens: Mapping[str, Tensor], latents: Tensor) -> Tensor:  # noqa: D102
        texts = [modules[name](ids, output_hidden_states=True) for name, ids in tokens.items()]
        hidden = torch.cat([text.hidden_states[-2] for text in texts], -1)
        added = {"text_embeds": texts[1][0], "time_ids": torch.zeros(1, 6)}
        return modules["unet"](latents, 0, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
