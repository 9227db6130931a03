"""Sana."""

from __future__ import annotations

from typing import Any, ClassVar

from sdprune.pipelines.base import DiffusersFamily


class Sana(DiffusersFamily):
    """A diffusers `SanaPipeline`: a Gemma text encoder and a linear transformer.

    Prompts are read behind the pipeline's own instruction, as by default. Pictures are drawn in the size that is asked
    for.

    Args:
        model: a hub id or a diffusers directory.
        kwargs: options that every family has.
    """

    pipeline = "SanaPipeline"
    parts: ClassVar = {
        "text_encoder": ("transformers", ("Gemma2Model",)),
        "tokenizer": ("transformers", ("GemmaTokenizer", "GemmaTokenizerFast")),
        "transformer": ("diffusers", ("SanaTransformer2DModel",)),
        "vae": ("diffusers", ("AutoencoderDC",)),
    }
    call: ClassVar = {"clean_caption": False, "use_resolution_binning": False}
    schedulers: ClassVar = (
        "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler",
    )  # fmt: skip
    scheduling: ClassVar = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    float32_noise = True

    def __init__(self, model: str = "Efficient-Large-Model/Sana_1600M_1024px_diffusers", **kwargs: Any):
        super().__init__(model, **kwargs)
