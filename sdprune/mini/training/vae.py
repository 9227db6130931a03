"""The stage of the VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdprune.mini.models import build_vae
from sdprune.mini.training.stage import Stage


class VaeStage(Stage):
    """AutoencoderKL, 64 x 64 x 3 to 8 x 8 x 8: squared and absolute error and a small KL term.

    Args:
        kl: weight of the KL term.
        decoder_only: leave the encoder as it is, so that a U-Net trained on its latents still fits.
    """

    name = "vae"

    def __init__(self, kl: float = 2e-4, decoder_only: bool = False, **options: Any):
        super().__init__(**options)
        self.kl, self.decoder_only = kl, decoder_only

    def configure_model(self) -> None:
        """Build it, or read the one to resume."""
        from diffusers import AutoencoderKL

        if hasattr(self, "model"):
            return
        vae = AutoencoderKL.from_pretrained(self.part("parts", "vae")) if self.resume else build_vae()
        for encoder in (vae.encoder, vae.quant_conv) if self.decoder_only else ():
            encoder.requires_grad_(False)
        self.build(vae)

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """mse + 0.5 mae + kl * (nats a latent number)."""
        posterior = self.model.encode(pictures).latent_dist  # type: ignore[operator]
        output = self.model.decode(posterior.sample()).sample.float()  # type: ignore[operator]
        error = output - pictures
        nats = posterior.kl().float().mean() / posterior.mean[0].numel()
        return error.square().mean() + 0.5 * error.abs().mean() + self.kl * nats

    @torch.no_grad()
    def save(self, model: Any) -> Path:
        """Save with the scaling factor that gives the latents unit variance (Rombach et al. 2022, G.1)."""
        if not self.decoder_only:
            pictures = self.trainer.datamodule.pictures[:512].float() / 127.5 - 1  # type: ignore[attr-defined]
            latents = model.float().encode(pictures.to(model.device)).latent_dist.mean
            model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        model.half().save_pretrained(self.weights / "parts" / "vae")
        return self.weights / "parts" / "vae"
