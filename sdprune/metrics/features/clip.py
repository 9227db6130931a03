"""CLIP's embeddings of images and texts, with preprocessing that needs no torchvision."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.hub import asking_hub
from sdprune.identity import facts_of
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.features.inference import exact_inference
from sdprune.metrics.features.preprocess import ClipPreprocessing
from sdprune.metrics.rows import Column, ImageBatch
from sdprune.outside import read_config, reading
from sdprune.pipelines.directory import require_all_weights
from sdprune.pipelines.resolve import resolve

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


_LONGEST_EDGE = 4096  # of a resized picture, in pixels


class ClipImageFeatures(FeatureExtractor):
    """CLIP's image embeddings (the projection's output, not normalised) as features; also its text embeddings.

    Weights are read from safetensors only, without remote code, and run in fp32.

    Args:
        model: a directory, a hub id, or `miniature` for the evaluator that comes with this package.
        revision: branch, tag or commit of the hub repository; None means `main`.
        processor: directory or hub id of the tokenizer and the preprocessing; None means those of `model`.
    """

    def __init__(
        self, model: str = "openai/clip-vit-base-patch32", revision: str | None = None, processor: str | None = None
    ) -> None:
        self.model = model
        self.revision = revision
        self.processor = processor
        self.device = torch.device("cpu")

    @property
    def source(self) -> str:
        """Directory or hub id that the weights come from."""
        return resolve(self.model, "evaluator")

    @property
    def name(self) -> str:
        """With the hub id, or a directory's own name."""
        return f"clip:{Path(self.model).name if Path(self.model).is_dir() else self.model}"

    @property
    def num_features(self) -> int:
        """Width of the shared image and text space; loads the model at first use."""
        config: Any = self.network.config
        return config.projection_dim

    @cached_property
    def _loaded(self) -> "tuple[CLIPModel, CLIPTokenizer, ClipPreprocessing]":
        """The network, the tokenizer and the preprocessing. Raises InputError when they cannot be had."""
        return _load(self.source, self.revision or "main", self.processor)

    def load(self, device: torch.device | str) -> None:  # noqa: D102
        self.device = torch.device(device)
        self.network.to(self.device)

    @property
    def network(self) -> "CLIPModel":
        """The model; loaded at first use."""
        return self._loaded[0]

    def preprocess(self, images: Tensor, generated: bool = True) -> Tensor:  # noqa: D102
        return self._loaded[2](images.to(self.device))

    def extract(self, pixels: Tensor) -> Tensor:  # noqa: D102
        with exact_inference(self.device):
            output = self.network.get_image_features(pixel_values=pixels.to(self.device))
        return output.pooler_output.float()

    @property
    def texts(self) -> Column:
        """The embeddings of the prompts, named after the model."""
        return Column(f"{self.key}.texts", self._of_prompts, self.load, facts_of(self))

    def _of_prompts(self, batch: ImageBatch) -> Tensor:
        return self.text_embeddings(batch.texts())

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [b, d] float32, not normalised; prompts are cut at the model's length (77 tokens in CLIP).

        Always padded to that length, so that a prompt's numbers do not hang on how long its neighbours are.
        """
        network, tokenizer, _ = self._loaded
        config: Any = network.config
        length = min(config.text_config.max_position_embeddings, tokenizer.model_max_length)
        tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with exact_inference(self.device):
            output = network.get_text_features(**tokens.to(self.device))
        return output.pooler_output.float()

    def describe(self) -> dict[str, Any]:
        """A hash of local files, or the hub id and the revision that was given."""
        return {"class": "ClipImageFeatures", **self._facts}

    @cached_property
    def _facts(self) -> dict[str, Any]:
        facts = {"model": self.model, "revision": self.revision or "main"}
        if Path(self.source).is_dir():
            facts = {"weights": directory_hash(Path(self.source))}
        if self.processor is not None:
            local = Path(self.processor)
            facts["processor"] = directory_hash(local) if local.is_dir() else self.processor
        return facts


def directory_hash(directory: Path) -> str:
    """SHA-256 over the names and contents of a model directory's json, txt and safetensors files, in name order."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in {".json", ".txt", ".safetensors"}:
            with reading(f"{path} is damaged"), path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _load(source: str, revision: str, processor: str | None) -> "tuple[CLIPModel, CLIPTokenizer, ClipPreprocessing]":
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    where = "no such directory" if source.startswith(("/", ".", "~")) and not Path(source).is_dir() else ""
    then = "Give a directory that transformers saved, a hub id that can be reached or is cached, or 'miniature'."
    what, problem = f"The CLIP model {source!r}", f"Cannot load the CLIP model {source!r}"
    if where:
        raise InputError(f"{problem}: {where}. {then}")
    if (Path(source) / "config.json").exists():
        read_config(Path(source) / "config.json")
    here = all(Path(place).is_dir() for place in (source, processor or source))
    local = {"trust_remote_code": False}
    with reading(problem, then) if here else asking_hub(what, then), _quiet_loading():
        beside = {"revision": revision} if processor is None else {}
        config, _ = ImageProcessingMixin.get_image_processor_dict(processor or source, **beside)
        tokenizer = CLIPTokenizer.from_pretrained(processor or source, **beside, **local)
        # Named, so that no configuration chooses another implementation: it could be code of the hub.
        network, found = CLIPModel.from_pretrained(
            source, revision=revision, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa",
            output_loading_info=True, **local,
        )  # fmt: skip
        preprocessing = ClipPreprocessing.from_config(config)
        _require_fit(network.config, tokenizer, preprocessing)
    require_all_weights(what, found)
    return network.eval().requires_grad_(False), tokenizer, preprocessing


def _require_fit(config: Any, tokenizer: Any, preprocessing: ClipPreprocessing) -> None:
    """Raise ValueError unless what comes out of tokenizer and preprocessing can go into the network."""
    size, words = config.vision_config.image_size, config.text_config.vocab_size
    edges = [preprocessing.shortest_edge or size, *(preprocessing.size or ())]
    made = preprocessing.crop or preprocessing.size or (size, size)
    if made != (size, size) or not all(1 <= edge <= _LONGEST_EDGE for edge in edges):
        raise ValueError(f"its preprocessing does not make pictures of {size} x {size}, which the network takes")
    if any(
        len(colours) != 3 or not torch.tensor(colours).isfinite().all()
        for colours in (preprocessing.mean, preprocessing.std)
    ):
        raise ValueError("its preprocessing is not for pictures of three colours")
    if max(tokenizer.get_vocab().values()) >= words or tokenizer.model_max_length < 2:
        raise ValueError(f"its tokenizer does not number tokens below {words}, which the network takes")
    tokenizer(["a word"], padding="max_length", truncation=True, max_length=2)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' progress bar of a second-long load away from users."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
