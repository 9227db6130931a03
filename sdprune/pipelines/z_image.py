"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

from sdprune.pipelines.base import DiffusersFamily


class ZImage(DiffusersFamily):
    """A diffusers `ZImagePipeline`: a Qwen3 text encoder and a transformer.

    The guidance is the classifier-free guidance scale as everywhere: one more than the pipeline's `guidance_scale`.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "ZImagePipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("Qwen3ForCausalLM", "Qwen3Model")),
        "tokenizer": ("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        "transformer": ("diffusers", ("ZImageTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKL",)),
    }
    schedulers: ClassVar = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
    unconditional = 1
    timestep = "t"
    float32_noise = True
    patch = 2
    idle: ClassVar = {"text_encoder": ("lm_head", "model.layers.{last}.*", "layers.{last}.*")}

    def __init__(self, model: str = "Tongyi-MAI/Z-Image-Turbo", **kwargs: Any):
        super().__init__(model, **kwargs)

    def guide(self, guidance: float, images: int) -> dict[str, Any]:  # noqa: D102
        return {"guidance_scale": guidance - 1}

    def rows(self, layer: str, arguments: Mapping[str, Any]) -> Optional[Sequence[int]]:  # noqa: D102
        from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

        if layer.startswith("all_x_embedder."):
            lengths = [image[0].numel() // self.patch**2 for image in arguments["x"]]
        elif layer.startswith("cap_embedder."):
            lengths = [len(caption) for caption in arguments["cap_feats"]]
        else:
            return None
        return [-(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF for length in lengths]
