"""Batches of rendered scenes and their captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Dict, Optional

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sdprune.mini.world import scenes


class WorldTrainingData(LightningDataModule):
    """Batches of (uint8 pictures [b, 3, 64, 64], captions), drawn at random from rendered training scenes.

    Args:
        n: scenes rendered at the start and kept in memory (0.4 ms and 12 kB each).
        batch_size: pictures a step.
        seed: of the scenes and of the drawing.
        steps: batches in an epoch; one epoch is the whole training.
        often: how much more often than others a scene of a category is drawn: {count: 2.5}.
    """

    def __init__(
        self, n: int = 20_000, batch_size: int = 64, seed: int = 0, steps: int = 1_000,
        often: Optional[Dict[str, float]] = None,
    ):  # fmt: skip
        super().__init__()
        self.n, self.batch_size, self.seed, self.steps, self.often = n, batch_size, seed, steps, often or {}

    def setup(self, stage: str) -> None:
        """Render the scenes."""
        drawn = list(scenes("train", self.n, self.seed))
        self.pictures = torch.stack([torch.tensor(scene.render()).permute(2, 0, 1) for scene in drawn])
        self.scenes, self.captions = drawn, [scene.captions for scene in drawn]

    def train_dataloader(self) -> DataLoader:
        """One epoch of `steps` batches."""
        return DataLoader(_RandomBatches(self), batch_size=None)


class _RandomBatches(IterableDataset):
    def __init__(self, data: WorldTrainingData):
        self.data = data

    def __len__(self) -> int:
        return self.data.steps

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], Tensor]]:
        data = self.data
        done = data.trainer.global_step if data.trainer else 0  # a resumed training draws on, it does not repeat
        generator = torch.Generator().manual_seed((torch.initial_seed() + 7919 * done) % 2**63)
        weights = torch.tensor([data.often.get(scene.category, 1.0) for scene in data.scenes])
        for _ in range(data.steps):
            index = torch.multinomial(weights, data.batch_size, replacement=True, generator=generator)
            wording = torch.randint(3, (data.batch_size,), generator=generator)
            captions = [data.captions[i][w] for i, w in zip(index.tolist(), wording.tolist(), strict=True)]
            yield data.pictures[index], captions, index
