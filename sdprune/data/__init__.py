"""Captions and real images: where they come from, which are drawn, and how they are dealt to processes."""

from typing import TYPE_CHECKING, Any

from sdprune.data.batches import Batch, Batches, BatchSampler, draw
from sdprune.data.hub import HubDataset
from sdprune.data.sources import CaptionSource, CocoDirectory, TextFile

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


def __getattr__(name: str) -> Any:
    """Import the data module on first use: Lightning takes seconds."""
    if name == "CocoDataModule":
        from sdprune.data.coco import CocoDataModule

        return CocoDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
