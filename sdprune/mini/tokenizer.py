"""A real byte-level BPE for CLIPTokenizer, trained on the world's own captions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdprune.mini.world import scenes

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 24  # the longest caption has 16 words
_MARKERS = ["<|startoftext|>", "<|endoftext|>"]
_SUFFIX = "</w>"


def train_tokenizer(captions: int = 5_000, vocabulary: int = 1_024) -> CLIPTokenizer:
    """Train the BPE on the captions of the first training scenes.

    Its length limit is MAX_LENGTH tokens, both markers counted; any other text falls back to bytes, as in CLIP.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_MARKERS,
        initial_alphabet=alphabet,
        end_of_word_suffix=_SUFFIX,
        show_progress=False,
    )
    backend = CLIPTokenizer().backend_tokenizer  # CLIP's own normaliser and pre-tokeniser
    backend.train_from_iterator((text for scene in scenes("train", captions) for text in scene.captions), trainer)
    model = json.loads(backend.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for symbol in alphabet:  # the trainer knows only the word endings it saw
        vocab.setdefault(symbol + _SUFFIX, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
