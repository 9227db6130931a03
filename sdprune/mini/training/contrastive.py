"""The stage of the text encoder and of the evaluator: pictures and captions by contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdprune.mini.captions import parse
from sdprune.mini.grounding import ANSWERS, objects_loss
from sdprune.mini.models import build_clip, save_evaluator, text_tower
from sdprune.mini.tokenizer import MAX_LENGTH, train_tokenizer
from sdprune.mini.training.stage import Stage


class ClipWithHeads(nn.Module):
    """A CLIP and a head for each tower, thrown away later, that reads from its pooled state what stands where."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip
        widths = clip.config.vision_config.hidden_size, clip.config.text_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, 2 * ANSWERS) for width in widths)


class ContrastiveStage(Stage):
    """A CLIP trained on (picture, caption) pairs by the symmetric contrastive loss (Radford et al. 2021).

    Each caption brings some of its twins, texts of the same words in another order, as further texts that its picture
    does not show (Yuksekgonul et al. 2023): without them a CLIP reads a bag of words. They alone did not teach it order
    in 1,200 steps; heads that read from either tower's pooled state which objects stand where do.

    Args:
        keep: `text_encoder` saves the text tower and the tokenizer for the pipeline; `evaluator` saves all.
        twins: of each caption.
        grounding: weight of what the heads read.
    """

    def __init__(
        self, keep: str = "text_encoder", text_layers: int = 6, image_layers: int = 4, image_width: int = 128,
        twins: int = 2, grounding: float = 1.0, **options: Any,
    ):  # fmt: skip
        super().__init__(**options)
        self.name = self.keep = keep
        self.text_layers, self.image_layers, self.image_width = text_layers, image_layers, image_width
        self.twins, self.grounding = twins, grounding

    def configure_model(self) -> None:
        """Build both towers and the tokenizer, or read those to resume."""
        from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

        if hasattr(self, "model"):
            return
        self.tokenizer = train_tokenizer()
        evaluator = self.keep == "evaluator"
        clip: Any = build_clip(self.tokenizer, self.text_layers, self.image_layers, self.image_width)
        if self.resume:
            before = self.part("evaluator") if evaluator else self.part("parts", "text_encoder")
            known = CLIPTokenizer.from_pretrained(before if evaluator else self.part("parts", "tokenizer"))
            state = (CLIPModel if evaluator else CLIPTextModel).from_pretrained(before).float().state_dict()
            state = {name if evaluator else f"text_model.{name}": value for name, value in state.items()}
            table = "text_model.embeddings.token_embedding.weight"
            state[table] = renumbered(state[table], known, clip.state_dict()[table], self.tokenizer)
            clip.load_state_dict(state, strict=evaluator)
        clip.set_attn_implementation("eager")  # on CPUs the backward pass takes half the time
        self.build(ClipWithHeads(clip))

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """Cross-entropy over the batch, both ways; texts that are true of a picture are no negatives of it."""
        contents = [self.trainer.datamodule.scenes[i].content for i in index.tolist()]  # type: ignore[attr-defined]
        texts = [*captions, *(text for caption in captions for text in some_twins(caption, self.twins))]
        tokens = self.tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        model: Any = self.model
        output = model.clip(input_ids=tokens["input_ids"].to(self.device), pixel_values=pictures)
        said = [parse(text) for text in texts]
        true = torch.tensor([[content.shows(text) for text in said] for content in contents], device=self.device)
        true.fill_diagonal_(False)
        logits = output.logits_per_image.float().masked_fill(true, -1e4)
        target = torch.arange(len(contents), device=self.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(target)].T, target)) / 2
        pictured = [content.picture for content in contents]
        end = (tokens["input_ids"] == self.tokenizer.eos_token_id).int().argmax(1)[: len(contents)]
        towers = output.vision_model_output.last_hidden_state, output.text_model_output.last_hidden_state
        for head, states, place in zip(model.heads, towers, (0, end), strict=True):
            objects = head(states[torch.arange(len(contents)), place]).unflatten(1, (2, ANSWERS))
            loss = loss + self.grounding * objects_loss(objects, pictured)
        return loss

    def save(self, model: Any) -> Path:
        """Save the tower that is kept, with the tokenizer."""
        model = model.clip
        if self.keep == "evaluator":
            save_evaluator(self.weights / "evaluator", model, self.tokenizer)
            return self.weights / "evaluator"
        text_tower(model).half().save_pretrained(self.weights / "parts" / "text_encoder")
        self.tokenizer.save_pretrained(self.weights / "parts" / "tokenizer")
        return self.weights / "parts" / "text_encoder"


def some_twins(caption: str, n: int) -> list[str]:
    """n of the caption's twins at random, in the same wording."""
    content = parse(caption)
    assert content
    wording, twins = content.captions.index(caption), content.twins()
    return [twins[i].captions[wording] for i in torch.randint(len(twins), (n,)).tolist()]


def renumbered(table: Tensor, known: Any, start: Tensor, tokenizer: Any) -> Tensor:
    """A table of token embeddings in the order of another tokenizer; tokens that are new get their row of `start`."""
    rows, new = known.get_vocab(), start.clone()
    for token, row in tokenizer.get_vocab().items():
        if token in rows:
            new[row] = table[rows[token]]
    return new
