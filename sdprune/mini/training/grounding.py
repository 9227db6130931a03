"""The stage in which the text encoder learns what stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sdprune.mini.grounding import Grounded, grounding_loss
from sdprune.mini.tokenizer import MAX_LENGTH
from sdprune.mini.training.stage import Stage


class GroundingStage(Stage):
    """The text encoder learns to say in its states what stands where, from captions and pictures' layouts alone."""

    name = "grounding"

    def configure_model(self) -> None:
        """Read the text encoder that the contrastive stage left."""
        from transformers import CLIPTextModel, CLIPTokenizer

        if hasattr(self, "model"):
            return
        text = CLIPTextModel.from_pretrained(self.part("parts", "text_encoder")).float()
        text.set_attn_implementation("eager")  # on CPUs the backward pass takes half the time
        self.tokenizer = CLIPTokenizer.from_pretrained(self.part("parts", "tokenizer"))
        self.build(Grounded(text))

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Of both heads."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        contents = [self.trainer.datamodule.scenes[i].content for i in index.tolist()]  # type: ignore[attr-defined]
        return grounding_loss(self.model(tokens["input_ids"].to(self.device)), pictures, contents)

    def save(self, model: Any) -> Path:
        """Save the text encoder in place of the one it began as."""
        model.text.half().save_pretrained(self.weights / "parts" / "text_encoder")
        return self.weights / "parts" / "text_encoder"
