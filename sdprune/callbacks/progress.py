"""One progress bar over images; plain lines when the output is no terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ImageProgress(Callback):
    """Counts the images of this process's batches, times the number of processes.

    Args:
        lines: how many lines are printed where no bar can be drawn.
    """

    def __init__(self, lines: int = 5) -> None:
        self.lines = lines
        self.bar: Progress | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the name of the run and an empty bar."""
        self.shown = trainer.is_global_zero and not pl_module.finished
        if not self.shown:
            return
        self.total, self.done, self.started, self.printed = len(pl_module.data.examples), 0, time.monotonic(), 0
        self.title = pl_module.record.directory.name.rsplit("-", 1)[0]
        console = Console()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(self.title, total=self.total)
            self.bar.start()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count a batch."""
        if not self.shown:
            return
        self.done = min(self.total, self.done + batch.valid * trainer.world_size)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif self.done * self.lines // self.total > self.printed:
            self.printed = self.done * self.lines // self.total
            seconds = time.monotonic() - self.started
            print(f"{self.title}: {self.done} of {self.total} images, {seconds:.0f} s", flush=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self.on_predict_end(trainer, pl_module)
