"""What every stage is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdprune.errors import InputError
from sdprune.files import require_writable, write_json
from sdprune.pipelines.resolve import SHIPPED


class Stage(LightningModule):
    """AdamW with warm-up and cosine decay over the trainer's steps, an exponential average of the weights, a record.

    Args:
        weights: the directory that receives the finished weights and checkpoints, and holds those of earlier stages.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        ema: decay of the exponential average that is saved.
        resume: start from the weights that are there already, instead of at random.

    Raises:
        InputError: `weights` lies in the installed package, or cannot be written.
    """

    name: str
    model: nn.Module

    def __init__(
        self, weights: str = "runs/miniature", lr: float = 1e-3, warmup: int = 100, ema: float = 0.999,
        resume: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.weights, self.lr, self.warmup, self.resume = Path(weights), lr, warmup, resume
        self.ema_decay = ema
        self.losses: list[float] = []
        self.started = time.monotonic()
        if self.weights.resolve().is_relative_to(SHIPPED.resolve()):
            raise InputError(
                f"weights is {weights}, the miniature that comes with sdprune: train into another directory, such as "
                "runs/miniature, and put it into the package with python -m sdprune.mini.install runs/miniature."
            )

    def keep_checkpoints(self, trainer: Trainer) -> None:
        """Put the checkpoints under `weights`, so that trainings into two directories never continue each other."""
        require_writable(self.weights, "--model.weights")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.weights / "checkpoints" / self.name).absolute())

    def build(self, model: nn.Module) -> None:
        """Take the model to train and start its average."""
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.ema_decay), use_buffers=True)

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """The stage's training loss; pictures in [-1, 1]."""
        raise NotImplementedError

    def save(self, model: nn.Module) -> Path:
        """Write the averaged model under `weights` and return where."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, list[str], Tensor]) -> Tensor:
        """Loss of one batch."""
        pictures, captions, index = batch
        loss = self.loss(pictures.float() / 127.5 - 1, captions, index)
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW; one learning-rate step a batch."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            decay = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, step / total))).item())
            return min(1.0, (step + 1) / max(1, self.warmup)) * max(decay, 0.01)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the average."""
        if self.global_step == self.warmup:  # forget the random start
            self.average.module.load_state_dict(self.model.state_dict())
        else:
            self.average.update_parameters(self.model)
        total = int(self.trainer.estimated_stepping_batches)
        if self.global_step % min(100, max(1, total // 10)) == 0:
            recent = self.losses[-100:]
            spent = time.monotonic() - self.started
            left = spent / len(self.losses) * (total - self.global_step)
            print(
                f"{self.name}: step {self.global_step} of {total}, loss {sum(recent) / len(recent):.5f}, "
                f"{spent / 60:.1f} min, about {left / 60:.1f} min to go",
                flush=True,
            )

    def on_train_end(self) -> None:
        """Save the average in fp16 and note the losses beside it."""
        if not self.trainer.is_global_zero:
            return
        saved = self.save(self.average.module.half().eval())
        path = self.weights / "training.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        recent = self.losses[-200:]
        before = record.get(self.name, {}).get("steps", 0) if self.resume else 0
        record[self.name] = {
            "final_loss": round(sum(recent) / len(recent), 6),
            "steps": before + self.global_step,
            "minutes": round((time.monotonic() - self.started) / 60, 1),
            "resumed": self.resume,
        }
        write_json(path, dict(sorted(record.items())))
        print(f"Saved: {saved}, after {self.global_step} steps", flush=True)

    def on_fit_end(self) -> None:
        """Say so when the last checkpoint was that of a finished training, so that nothing was done."""
        if not self.losses and self.trainer.is_global_zero:
            print(f"{self.name}: already trained, {self.global_step} steps: {self.weights}", flush=True)

    def part(self, *names: str) -> Path:
        """A directory under `weights` that an earlier stage wrote.

        Raises:
            InputError: it is not there.
        """
        path = self.weights.joinpath(*names)
        if not path.is_dir():
            raise InputError(f"{path} is missing: run the stage that writes it first (configs/mini/).")
        return path
