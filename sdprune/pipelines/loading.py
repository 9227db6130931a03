"""A saved model as a plain pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sdprune.errors import InputError
from sdprune.outside import read_json
from sdprune.pipelines.base import families
from sdprune.pipelines.directory import INDEX

if TYPE_CHECKING:
    import torch


def load(
    directory: str | Path, dtype: Optional[torch.dtype] = None, device: str | torch.device = "cpu",
    variant: Optional[str] = None, text_once: bool = False,
) -> Any:  # fmt: skip
    """Load a model that sdprune has saved, narrowed, packed and lossless ones too, as a pipeline of diffusers.

    Only safetensors and configurations are read, and only classes of the family are made.

    Args:
        directory: of the model.
        dtype: of its weights; by default float32.
        device: where it goes.
        variant: file variant of its weights, e.g. fp16.
        text_once: whether the denoiser computes what depends on the text alone, such as the keys and values of its
            cross-attention, once for each prompt in place of at every step: the same bits. The weights of these layers
            must not change any more.

    Returns:
        The pipeline, such as a `StableDiffusionPipeline`.

    Raises:
        InputError: it is no directory of a known family of pipelines, or it is damaged.
    """
    import torch

    from sdprune.pipelines.text_once import TextOnce

    path = Path(directory)
    if not (path / INDEX).is_file():
        raise InputError(f"{path} is no diffusers directory: it has no {INDEX}.")
    index = read_json(path / INDEX)
    named = index.get("_class_name") if isinstance(index, dict) else None
    known = families()
    first = next(iter(known.values()))  # says what is wrong
    family: Any = known.get(named, first) if isinstance(named, str) else first
    made = family(model=str(path), variant=variant)
    made.load(dtype or torch.float32, torch.device(device))
    if text_once:
        TextOnce(made.components[made.denoiser], made.proof.text, made.timestep)
    return made.pipe
