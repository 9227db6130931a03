"""Flux.1, dev and schnell."""

from __future__ import annotations

from typing import Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily


class Flux(DiffusersFamily):
    """A diffusers `FluxPipeline`: a CLIP and a T5 text encoder and a transformer.

    The guidance is a number that the transformer of Flux dev reads; that of Flux schnell reads none. No step predicts
    twice, and there is no negative prompt.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "FluxPipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("CLIPTextModel",)),
        "text_encoder_2": ("transformers", ("T5EncoderModel",)),
        "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
        "tokenizer_2": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        "transformer": ("diffusers", ("FluxTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    }
    schedulers: ClassVar = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
    patch = 2

    def __init__(self, model: str = "black-forest-labs/FLUX.1-dev", **kwargs: Any):
        super().__init__(model, **kwargs)
