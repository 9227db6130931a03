"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily

_CLIP = ("transformers", ("CLIPTextModelWithProjection",))
_CLIP_TOKENIZER = ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))


class StableDiffusion3(DiffusersFamily):
    """A diffusers `StableDiffusion3Pipeline`: two CLIP text encoders, a T5 text encoder and a transformer.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "StableDiffusion3Pipeline"
    parts: ClassVar = {
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": ("transformers", ("T5EncoderModel",)),
        "tokenizer": _CLIP_TOKENIZER,
        "tokenizer_2": _CLIP_TOKENIZER,
        "tokenizer_3": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        "transformer": ("diffusers", ("SD3Transformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    }
    schedulers: ClassVar = (
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    )  # fmt: skip
    patch = 2
    idle: ClassVar = {"transformer": ("transformer_blocks.{last}.attn.add_q_proj",)}

    def __init__(self, model: str = "stabilityai/stable-diffusion-3-medium-diffusers", **kwargs: Any):
        super().__init__(model, **kwargs)
