"""The stage of the U-Net, in which the text encoder goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdprune.mini.models import (
    build_scheduler,
    build_unet,
    save_pipeline,
)  # fmt: skip
from sdprune.mini.tokenizer import MAX_LENGTH
from sdprune.mini.training.stage import Stage


class Denoiser(nn.Module):
    """U-Net and text encoder as one model: tokens in, v out."""

    def __init__(self, unet: nn.Module, text: nn.Module):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
        """v [b, c, h, w] of noisy latents [b, c, h, w] at steps [b] under tokens [b, length]."""
        return self.unet(noisy, step, self.text(tokens)[0]).sample


class UNetStage(Stage):
    """U-Net on the VAE's latents, v-prediction (Salimans & Ho 2022), 10 % empty captions for guidance.

    The text encoder is trained further: after the contrastive stage colours make up half of its variance, shapes a
    tenth, and a U-Net on top of it frozen still ignored the shape when it had long followed the colour.
    """

    name = "unet"

    def configure_model(self) -> None:
        """Read the finished parts, build the U-Net or read the one to resume."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from transformers import CLIPTextModel, CLIPTokenizer

        if hasattr(self, "model"):
            return
        parts = "pipeline" if self.resume else "parts"  # the text encoder is trained further with the U-Net
        vae = AutoencoderKL.from_pretrained(self.part(parts, "vae")).float().eval()
        self.frozen = [vae.requires_grad_(False)]  # in a list: neither saved nor averaged
        self.tokenizer = CLIPTokenizer.from_pretrained(self.part(parts, "tokenizer"))
        self.scheduler = build_scheduler()
        text = CLIPTextModel.from_pretrained(self.part(parts, "text_encoder")).float()
        resumed = self.resume and UNet2DConditionModel.from_pretrained(self.part("pipeline", "unet")).float()
        unet = resumed or build_unet()
        text.set_attn_implementation("eager")  # on CPUs the backward pass takes half the time
        unet.set_attn_processor(AttnProcessor())
        self.build(Denoiser(unet, text))

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Encode every training picture and tokenize every caption once."""
        vae = self.frozen[0].to(self.device)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        chunks = [vae.encode(p.to(self.device).float() / 127.5 - 1).latent_dist for p in data.pictures.split(256)]
        self.latents = torch.cat([chunk.mean for chunk in chunks]) * vae.config.scaling_factor
        self.spread = torch.cat([chunk.std for chunk in chunks]) * vae.config.scaling_factor

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Mean squared error of v."""
        index = index.to(self.device)
        latents = self.latents[index] + self.spread[index] * torch.randn_like(self.latents[index])
        empty = (torch.rand(len(captions)) < 0.1).tolist()
        texts = ["" if drop else caption for caption, drop in zip(captions, empty, strict=True)]
        tokens = self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
        noise, step = torch.randn_like(latents), timesteps(len(latents)).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, step)
        target = self.scheduler.get_velocity(latents, noise, step)
        return F.mse_loss(self.model(noisy, step, tokens.to(self.device)).float(), target.float())

    def save(self, model: Any) -> Path:
        """Save the whole pipeline."""
        save_pipeline(self.weights / "pipeline", self.frozen[0], model.text, self.tokenizer, model.unet)
        return self.weights / "pipeline"


def timesteps(n: int) -> Tensor:
    """Steps in 0 .. 999, logit-normal (Esser et al. 2024) for three in four, else uniform.

    The mode lies where the noise hides where the objects stand: there the caption has to be read.
    """
    noisy = torch.sigmoid(torch.randn(n) + 1.0)
    return (torch.where(torch.rand(n) < 0.75, noisy, torch.rand(n)) * 1000).long().clamp(max=999)
