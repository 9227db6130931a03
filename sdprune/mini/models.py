"""The miniature's architecture: each part of Stable Diffusion 2, made small; and the CLIP that scores it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdprune.mini.tokenizer import MAX_LENGTH, train_tokenizer
from sdprune.mini.world import SIDE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 8
TEXT_WIDTH = 192
PROJECTION = 64


def build_vae() -> AutoencoderKL:
    """64 x 64 x 3 to 8 x 8 x 8 and back."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def build_clip(tokenizer: CLIPTokenizer, text_layers: int, image_layers: int, image_width: int) -> CLIPModel:
    """A CLIP over 64 x 64 pictures in 8 x 8 patches, with 64 common dimensions."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 6,
        "hidden_act": "gelu",
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": PROJECTION,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image = {
        "hidden_size": image_width,
        "intermediate_size": 4 * image_width,
        "num_hidden_layers": image_layers,
        "num_attention_heads": image_width // 32,
        "image_size": SIDE,
        "patch_size": 8,
        "projection_dim": PROJECTION,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=PROJECTION))


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The text encoder of a CLIP, as a model of its own."""
    from transformers import CLIPTextModel

    text = CLIPTextModel(clip.config.text_config)
    state = {name.removeprefix("text_model."): value for name, value in clip.state_dict().items()}
    text.load_state_dict({name: state[name] for name in text.state_dict()})
    return text


def build_unet() -> UNet2DConditionModel:
    """8 x 8 latents with cross-attention at both levels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        attention_head_dim=(3, 5),  # the number of heads, as in SD2's configuration
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """SD2's own: v-prediction, scaled-linear betas."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def save_pipeline(
    directory: Path, vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write the parts as a StableDiffusionPipeline in fp16."""
    from diffusers import StableDiffusionPipeline

    from sdprune.pipelines.directory import save_portable

    pipe = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_portable(pipe, directory)


def save_evaluator(directory: Path, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Write a CLIP with all that scoring needs, in fp16."""
    from transformers import CLIPImageProcessor

    clip.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    half = [0.5, 0.5, 0.5]
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes, image_mean=half, image_std=half).save_pretrained(directory)


def save_random(directory: Path, seed: int = 0) -> None:
    """Write an untrained miniature, `pipeline`, `evaluator` and `examiner`: for tests of everything but quality."""
    import torch

    from sdprune.mini.examiner import Examiner

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(captions=300)
        clip = build_clip(tokenizer, text_layers=2, image_layers=1, image_width=32)
        save_pipeline(directory / "pipeline", build_vae(), text_tower(clip), tokenizer, build_unet())
        save_evaluator(directory / "evaluator", clip, tokenizer)
        Examiner().save(directory / "examiner")
