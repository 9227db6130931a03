"""Captions and real images: where they come from, which are drawn, and how they are dealt to processes."""

from typing import TYPE_CHECKING, Any

from sdprune.data import sources
from sdprune.data.batches import Batch, Batches, BatchSampler, draw
from sdprune.data.sources import CaptionSource
from sdprune.data.sources.coco_directory import CocoDirectory
from sdprune.data.sources.hub_dataset import HubDataset
from sdprune.data.sources.text_file import TextFile
from sdprune.schema import discover

if TYPE_CHECKING:
    from sdprune.data.coco import CocoDataModule

__all__ = [
    "Batch",
    "BatchSampler",
    "Batches",
    "CaptionSource",
    "CocoDataModule",
    "CocoDirectory",
    "HubDataset",
    "TextFile",
    "draw",
]

discover(sources)


def __getattr__(name: str) -> Any:
    """Import the data module on first use: Lightning takes seconds."""
    if name == "CocoDataModule":
        from sdprune.data.coco import CocoDataModule

        return CocoDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
