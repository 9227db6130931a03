"""PixArt-Sigma."""

from __future__ import annotations

from typing import Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily


class PixArtSigma(DiffusersFamily):
    """A diffusers `PixArtSigmaPipeline`: a T5 text encoder and a transformer.

    Captions are not cleaned, and pictures are drawn in the size that is asked for: what is drawn then depends on no
    further packages and on no table of sizes.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "PixArtSigmaPipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("T5EncoderModel",)),
        "tokenizer": ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        "transformer": ("diffusers", ("PixArtTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    }
    call: ClassVar = {"clean_caption": False, "use_resolution_binning": False}
    patch = 2

    def __init__(self, model: str = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", **kwargs: Any):
        super().__init__(model, **kwargs)
