"""Model families: how each is loaded, calibrated, drawn from and saved."""

from sdprune.pipelines.base import Drawn, PipelineFamily, Sampling
from sdprune.pipelines.stable_diffusion import StableDiffusion

__all__ = ["Drawn", "PipelineFamily", "Sampling", "StableDiffusion"]
