"""Writes Stable Diffusion 2 in its full size and its own layout, with weights that are random and quick to make."""

from pathlib import Path

import tiny_families
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PretrainedConfig, Qwen2_5_VLConfig, T5Config

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


def save_configuration(name: str, directory: Path) -> Path:
    """Write a family's pipeline in full size without weights; its tokenizers and its scheduler are the tiny ones."""
    tiny_families.save(name, directory)
    for file in directory.rglob("*.safetensors"):
        file.unlink()
    for part, config in CONFIGURATIONS[name].items():
        with torch.device("meta"):
            made = config()
        (made.save_pretrained if isinstance(made, PretrainedConfig) else made.save_config)(directory / part)
    return directory


def save_random_flux(directory: Path) -> Path:
    """Write a Flux whose transformer has three blocks of full width, bf16 in five shards; its other parts are tiny."""
    tiny_families.save("Flux", directory)
    for file in (Path(directory) / "transformer").iterdir():
        file.unlink()
    transformer = FluxTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=2, joint_attention_dim=tiny_families.WIDTH,
        pooled_projection_dim=16, guidance_embeds=True,
    )  # fmt: skip
    transformer.to(torch.bfloat16).save_pretrained(Path(directory) / "transformer", max_shard_size="300MB")
    return directory


FLOW_VAE = {"latent_channels": 16, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
CONFIGURATIONS = {
    "StableDiffusion": {
        "text_encoder": lambda: CLIPTextConfig(**TEXT), "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
    },
    "Flux": {
        "text_encoder": lambda: CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77,
        ),
        "text_encoder_2": lambda: T5Config(
            vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        ),
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
        "vae": lambda: AutoencoderKL(**VAE, **FLOW_VAE),
    },
    "QwenImage": {
        "text_encoder": lambda: Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
                "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
            },
            vision_config={
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
                "patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31],
            },
            tie_word_embeddings=False,
        ),
        "transformer": QwenImageTransformer2DModel, "vae": AutoencoderKLQwenImage,
    },
}  # fmt: skip


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
