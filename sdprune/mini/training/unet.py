"""The stage of the U-Net, in which the text encoder goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdprune.mini.captions import SIZES
from sdprune.mini.models import build_scheduler, build_unet, save_pipeline
from sdprune.mini.tokenizer import MAX_LENGTH
from sdprune.mini.training.stage import Stage
from sdprune.mini.world import Scene


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

    What the text says of sides moves the loss only where noise hides the layout, and there a U-Net draws the objects
    for long without minding them. So the two tokens that hold the objects (see `Grounded`) are made to be attended to
    from where these stand, as in TokenCompose (Wang et al. 2024): after 300 steps on nothing but noise the sides are
    right, after 4,000 without it half of them.

    Args:
        attention: weight of this.
        noisiest: share of the steps that are drawn from the noisiest fifth.
        mean: of the logit-normal law that most of the others are drawn from: 1 is for what stands where, less for form.
    """

    name = "unet"

    def __init__(self, attention: float = 0.5, noisiest: float = 0.3, mean: float = 1.0, **options: Any):
        super().__init__(**options)
        self.attention, self.noisiest, self.mean = attention, noisiest, mean
        self.attended: list[Tensor] = []
        """What each cross-attention of the last forward pass attended to, [b, places, tokens]."""

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
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                self._watch(module)

    def _watch(self, attention: Any) -> None:
        scores = attention.get_attention_scores

        def watched(*inputs: Any) -> Tensor:
            found: Tensor = scores(*inputs)
            self.attended.append(found.unflatten(0, (-1, attention.heads)).mean(1))
            return found

        attention.get_attention_scores = watched

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Encode every training picture and tokenize every caption once."""
        vae = self.frozen[0].to(self.device)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        chunks = [vae.encode(p.to(self.device).float() / 127.5 - 1).latent_dist for p in data.pictures.split(256)]
        self.latents = torch.cat([chunk.mean for chunk in chunks]) * vae.config.scaling_factor
        self.spread = torch.cat([chunk.std for chunk in chunks]) * vae.config.scaling_factor
        self.places = torch.stack([places(scene) for scene in data.scenes]).to(self.device)

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Mean squared error of v, and the share of their attention that the objects' tokens get from elsewhere."""
        index = index.to(self.device)
        latents = self.latents[index] + self.spread[index] * torch.randn_like(self.latents[index])
        empty = (torch.rand(len(captions)) < 0.1).tolist()
        texts = ["" if drop else caption for caption, drop in zip(captions, empty, strict=True)]
        tokens = self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
        noise, step = torch.randn_like(latents), timesteps(len(latents), self.noisiest, self.mean).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, step)
        target = self.scheduler.get_velocity(latents, noise, step)
        self.attended.clear()
        loss = F.mse_loss(self.model(noisy, step, tokens.to(self.device)).float(), target.float())
        said = self.places[index] * ~torch.tensor(empty, device=self.device)[:, None, None, None]
        return loss + self.attention * sum(astray(found, said) for found in self.attended) / len(self.attended)

    def save(self, model: Any) -> Path:
        """Save the whole pipeline."""
        save_pipeline(self.weights / "pipeline", self.frozen[0], model.text, self.tokenizer, model.unet)
        return self.weights / "pipeline"


def places(scene: Scene) -> Tensor:
    """Where each of two objects stands, [2, 8, 8]: 1 at the places that it covers; several of a kind are one object."""
    centres = torch.arange(8) * 8 + 4.0
    found = torch.zeros(2, 8, 8)
    for number, thing in enumerate(scene.things):
        reach = SIZES[thing.kind.size] + 2
        near = ((centres - thing.y).abs() <= reach)[:, None] & ((centres - thing.x).abs() <= reach)
        found[number if scene.content.relation else 0][near] = 1
    return found


def astray(attended: Tensor, said: Tensor) -> Tensor:
    """Mean squared share of the attention to the last two tokens that comes from where their objects do not stand.

    Args:
        attended: attention from places to tokens, [b, places, tokens].
        said: where the objects stand, [b, 2, 8, 8]; nowhere: the token does not count.
    """
    side = math.isqrt(attended.shape[1])
    stand = F.max_pool2d(said, 8 // side).flatten(2)
    to = attended[..., -2:].transpose(1, 2).float()
    away = 1 - (to * stand).sum(2) / to.sum(2).clamp(min=1e-6)
    return away[stand.any(2)].square().mean()


def timesteps(n: int, noisiest: float, mean: float) -> Tensor:
    """Steps in 0 .. 999: some from the noisiest fifth, the rest logit-normal (Esser et al. 2024) for three in four.

    In the noisiest fifth a layout is chosen; below, where most steps lie, the objects take their form.
    """
    even, normal = torch.rand(n), torch.sigmoid(torch.randn(n) + mean)
    step = torch.where(torch.rand(n) < 0.75, normal, even)
    return (torch.where(torch.rand(n) < noisiest, 0.8 + 0.2 * even, step) * 1000).long().clamp(max=999)
