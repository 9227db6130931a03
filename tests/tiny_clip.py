"""A CLIP model of a few thousand random weights, in the files that transformers saves."""

import json
import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

LENGTH = 12
SIZE = 30
WIDTH = 24


def save_tiny_clip(directory: Path, resample: int = 3) -> Path:
    """Write config, weights, tokenizer and preprocessor files; the same ones every time."""
    directory.mkdir(parents=True, exist_ok=True)
    letters = list(string.ascii_lowercase)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    special = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[1], "pad_token": words[1]}
    files = {
        "vocab.json": {word: number for number, word in enumerate(words)},
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special},
        "preprocessor_config.json": {
            "size": {"shortest_edge": SIZE},
            "crop_size": {"height": SIZE, "width": SIZE},
            "resample": resample,
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
            "image_processor_type": "CLIPImageProcessor",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    layer = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(words), "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": SIZE, "patch_size": 10}
    config = CLIPConfig(
        text_config={**layer, **text, "pad_token_id": 1, "projection_dim": WIDTH},
        vision_config={**layer, **vision, "projection_dim": WIDTH},
        projection_dim=WIDTH,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(directory)
    return directory
