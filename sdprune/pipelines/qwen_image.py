"""Qwen-Image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily

if TYPE_CHECKING:
    from torch import Tensor


class QwenImage(DiffusersFamily):
    """A diffusers `QwenImagePipeline`: a Qwen2.5-VL text encoder and a transformer.

    A guided step predicts in two calls, first with the prompts and then with a blank as negative prompt. The guided
    prediction gets the norm of that with the prompt.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "QwenImagePipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("Qwen2_5_VLForConditionalGeneration",)),
        "tokenizer": ("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        "transformer": ("diffusers", ("QwenImageTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderKLQwenImage",)),
    }
    schedulers: ClassVar = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
    unconditional = 1
    patch = 2
    idle: ClassVar = {
        "text_encoder": ("model.visual.*", "lm_head"),
        "transformer": tuple(
            f"transformer_blocks.{{last}}.{one}" for one in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.*")
        ),
    }

    def __init__(self, model: str = "Qwen/Qwen-Image", **kwargs: Any):
        super().__init__(model, **kwargs)

    def guide(self, guidance: float, images: int) -> dict[str, Any]:  # noqa: D102
        return {"true_cfg_scale": guidance, "negative_prompt": [" "] * images if guidance > 1 else None}

    def guided(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:  # noqa: D102
        found = super().guided(without, with_prompt, guidance)
        return found * with_prompt.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
