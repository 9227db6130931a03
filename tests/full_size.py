"""Writes Stable Diffusion 2 in its full size and its own layout, with weights that are random and quick to make."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdprune.mini.models import build_scheduler
from sdprune.mini.tokenizer import train_tokenizer

TEXT = {
    "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 512,
}  # fmt: skip
UNET = {
    "sample_size": 96, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024, "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768,
}  # fmt: skip


def save_full_size(directory: Path) -> Path:
    """Write 1.29 billion fp16 parameters, none of them zero."""
    tokenizer = train_tokenizer(captions=100)
    tokenizer.model_max_length = TEXT["max_position_embeddings"]
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**TEXT, **ends, pad_token_id=tokenizer.pad_token_id))
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    for part in (text, unet, vae):
        fill(part.to(torch.float16).to_empty(device="cpu"))
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def fill(model: nn.Module) -> None:
    """Weights from one pattern of normal numbers, again and again, scaled by the layer's inputs; norms at 1."""
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    pattern = torch.where(pattern.abs() < 0.01, 0.01, pattern)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.001)
            continue
        scaled = (pattern / parameter[0].numel() ** 0.5).half()
        times = -(-parameter.numel() // len(scaled))
        parameter.data.view(-1).copy_(scaled.repeat(times)[: parameter.numel()])
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
