"""Tiny pipelines with random weights, one a family: everything but the quality of their pictures is real."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

CONTEXT = 16
WIDTH = 32
"""Of the encoders that are no CLIP."""


def clip_tokenizer(**options: str):
    """Bytes and nothing else: it needs no vocabulary from a hub."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *characters(), *(f"{one}</w>" for one in characters())]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CONTEXT, **options)


def clip_config(tokenizer, width: int, layers: int, **options: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip


def characters():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def t5():
    """Printable characters and nothing else."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(chr(one), -3.0) for one in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def qwen_tokenizer():
    from transformers import Qwen2Tokenizer

    words = [*characters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.chat_template = (
        "{% for one in messages %}<|im_start|>{{ one['role'] }}\n{{ one['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen_config(tokenizer, **options):
    return dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, **options,
    )  # fmt: skip


def vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (16, 32), "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16, **options,
    })  # fmt: skip


def flow_vae():
    return vae(latent_channels=8, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def stable_diffusion_xl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    one, two = clip_tokenizer(), clip_tokenizer(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), norm_num_groups=8, cross_attention_dim=16 + 24,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 48,
        use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=CLIPTextModel(clip_config(one, 16, 3)), tokenizer=one, unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(two, 24, 2, projection_dim=12)), tokenizer_2=two,
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion():
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        attention_head_dim=(2, 4), norm_num_groups=8, cross_attention_dim=16,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(clip_config(tokenizer, 16, 3)), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_v():
    """Stable Diffusion 2 at 768 pixels predicts velocities."""
    pipe = stable_diffusion()
    pipe.register_modules(
        scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    )
    return pipe


def stable_diffusion_3(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    one, two, (text, three) = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, caption_projection_dim=64, pooled_projection_dim=8 + 12, out_channels=8,
        pos_embed_max_size=24, **options,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=flow_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(one, 12, 3, projection_dim=8)), tokenizer=one,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(two, 16, 2, projection_dim=12)), tokenizer_2=two,
        text_encoder_3=text, tokenizer_3=three,
    )  # fmt: skip


def stable_diffusion_3_5():
    return stable_diffusion_3(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def pixart_sigma():
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    text, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=3, patch_size=2, attention_head_dim=16, num_attention_heads=4, in_channels=4,
        cross_attention_dim=64, caption_channels=WIDTH, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae(), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def flux(guided: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    one, (text, two) = clip_tokenizer(), t5()
    transformer = FluxTransformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided), vae=flow_vae(),
        text_encoder=CLIPTextModel(clip_config(one, 16, 3)), tokenizer=one, text_encoder_2=text, tokenizer_2=two,
        transformer=transformer,
    )  # fmt: skip


def flux_schnell():
    return flux(guided=False)


def sana():
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{one:02X}>" for one in range(256)), "\u2581"]
    words += [chr(one) for one in range(33, 127)]
    tokenizer = GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, max_position_embeddings=2048,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=16, patch_size=1,
    )  # fmt: skip
    dc = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(config), vae=dc, transformer=transformer, scheduler=scheduler
    )


def qwen_image():
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config=qwen_config(
            tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        ),
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
            "patch_size": 4, "fullatt_block_indexes": [1],
        },
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    kl = AutoencoderKLQwenImage(
        base_dim=16, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=kl, tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config), transformer=transformer,
    )  # fmt: skip


def z_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    config = Qwen3Config(**qwen_config(tokenizer, head_dim=16, tie_word_embeddings=True))
    transformer = ZImageTransformer2DModel(
        in_channels=8, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[512, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=flow_vae(), tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(config), transformer=transformer,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], object]] = {
    "StableDiffusion": stable_diffusion,
    "StableDiffusionXL": stable_diffusion_xl,
    "StableDiffusion3": stable_diffusion_3,
    "PixArtSigma": pixart_sigma,
    "Flux": flux,
    "Sana": sana,
    "QwenImage": qwen_image,
    "ZImage": z_image,
}
VARIANTS: dict[str, Callable[[], object]] = {
    "StableDiffusion": stable_diffusion_v,
    "StableDiffusion3": stable_diffusion_3_5,
    "Flux": flux_schnell,
}
"""Other models of the same families."""


def save(name: str, directory: Path, builders: Mapping[str, Callable[[], object]] = FAMILIES) -> Path:
    """Write a family's pipeline as a diffusers directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = builders[name]()
    pipe.save_pretrained(directory)
    return directory
