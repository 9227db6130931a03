"""How far a run is: a bar in a terminal, a few plain lines elsewhere, and numbers for the loggers."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from sdprune.calibration.progress import CalibrationState
from sdprune.modules import FrozenModule, GenerationModule
from sdprune.search.module import SearchModule
from sdprune.search.search import Search

_SILENCE = 60.0  # seconds; after so long a line is printed whatever was done


class _Left(ProgressColumn):
    """The time that is left. Rich's own column forgets what is older than 30 s, and a batch may take minutes."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def render(self, task: Task) -> Text:
        """As hours, minutes and seconds."""
        end = self.meter.end
        return Text("" if end is None else f"{timedelta(seconds=max(0, int(end - time.monotonic())))} left")


class Meter:
    """Shows how many images, or what else is counted, are done.

    Args:
        title: of what.
        total: number of images.
        lines: how many lines are printed where no bar can be drawn.
        counted: images, or what else is counted.
    """

    def __init__(self, title: str, total: int, lines: int, counted: str = "images") -> None:
        self.title, self.total, self.lines, self.counted = title, total, lines, counted
        self.started = self.spoke = time.monotonic()
        self.first, self.shares = 0.0, 0
        """What was done when the clock started; how many of `lines` are behind us."""
        self.end: float | None = None
        """When all will be done, by the clock of `time.monotonic`."""
        self.bar: Progress | None = None
        console = Console()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, _Left(self), console=console)
            self.task = self.bar.add_task(title, total=total)
            self.bar.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def begin(self, done: float) -> None:
        """So many images were done before the clock started."""
        self.first, self.shares = done, int(done * self.lines / self.total)

    def update(self, done: float) -> None:
        """So many images are done."""
        now, left = time.monotonic(), 0.0
        if self.first < done < self.total:
            left = self.seconds * (self.total - done) / (done - self.first)
            self.end = now + left
        if self.bar is not None:
            self.bar.update(self.task, completed=int(done), total=self.total, description=self.title)
            return
        shares = int(done * self.lines / self.total)
        if shares > self.shares or now - self.spoke > _SILENCE:
            self.shares, self.spoke = shares, now
            about = f", about {left:.0f} s left" if left else ""
            print(f"{self.title}: {int(done)} of {self.total} {self.counted}, {self.seconds:.0f} s{about}", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class MeterCallback(Callback):
    """Has a meter on the first process while something is going on.

    Args:
        lines: how many lines are printed where no bar can be drawn.
    """

    def __init__(self, lines: int = 5) -> None:
        self.lines = lines
        self.meter: Meter | None = None

    def close(self) -> None:
        """Remove the bar."""
        if self.meter is not None:
            self.meter.close()
            self.meter = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self.close()

    def log_progress(self, trainer: Trainer, name: str, done: float) -> None:
        """Log how many images are done, and in how many seconds."""
        assert self.meter is not None
        for logger in trainer.loggers:
            logger.log_metrics({f"{name}/images": done, f"{name}/seconds": self.meter.seconds}, step=int(done))


class ImageProgress(MeterCallback):
    """Counts the images that are drawn: those of this process's batches, times the number of processes."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the name of the run and an empty bar, when calibration is over."""
        if isinstance(pl_module, GenerationModule) and trainer.is_global_zero and "images" in pl_module.todo:
            title = pl_module.record.directory.name.rsplit("-", 1)[0]
            self.done, self.name = 0, "progress" if pl_module.options.wanted else "dense/progress"
            self.meter = Meter(title, len(pl_module.data.examples), self.lines)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count a batch."""
        if self.meter is not None:
            self.done = min(self.meter.total, self.done + batch.valid * trainer.world_size)
            self.meter.update(self.done)
            self.log_progress(trainer, self.name, self.done)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self.close()


class SearchProgress(MeterCallback):
    """Shows which model a search tests, with how many images, what it lost so far, and what is left at most.

    Where no bar can be drawn, a line is printed for each test that is over.
    """

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        """Show the test that the next batch is for."""
        if not isinstance(pl_module, SearchModule) or not trainer.is_global_zero:
            return
        assert pl_module.search is not None
        search, current = pl_module.search, pl_module.search.probes[-1:]
        if self.meter is None:
            self.meter, self.over = Meter("scale of the loss", search.n_max, 0), 0
        self._tell(search)
        for one in current:
            self.meter.title = f"{search.told(one)}, at most {search.left} images left"
            for logger in trainer.loggers:
                numbers = {"search/test": len(search.probes), "search/images": one.n, "search/loss": one.loss}
                logger.log_metrics(numbers, step=sum(map(len, search.scores.values())))
        if self.meter.bar is not None:
            self.meter.update(current[0].n if current else 0)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the last test, and remove the bar."""
        if self.meter is not None and isinstance(pl_module, SearchModule) and pl_module.search is not None:
            self._tell(pl_module.search)
        self.close()

    def _tell(self, search: Search) -> None:
        over = [one for one in search.probes if one.decision is not None]
        assert self.meter is not None
        if self.meter.bar is None:
            for one in over[self.over :]:
                last = one is search.probes[-2:][0]  # the next one has begun
                left = f"; {search.probes[-1].path}: at most {search.left} images left" if last and search.left else ""
                print(f"{search.told(one)}, {self.meter.seconds:.0f} s{left}", flush=True)
        self.over = len(over)


class CalibrationProgress(MeterCallback):
    """Counts the images that calibration has been over, in `fit` and `predict` alike, every pass anew."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module report."""
        if isinstance(pl_module, FrozenModule) and trainer.is_global_zero:
            pl_module.on_calibration = self.show
            self.trainer = trainer

    def show(self, state: CalibrationState) -> None:
        """Show how far it is."""
        if state.number > state.passes:
            return self.close()
        title = f"calibration of {state.what}" + (
            f", pass {state.number} of {state.passes}" if state.passes > 1 else ""
        )
        done = (state.number - 1) * state.images + state.done
        if self.meter is None:
            self.meter = Meter(title, state.images * state.passes, self.lines, state.counted)
            self.meter.begin(done)
            if self.meter.bar is None:
                print(f"{title}: {state.images} {state.counted}", flush=True)
        self.meter.title, self.meter.total = title, state.images * state.passes
        self.meter.update(done)
        if state.done == int(state.done):  # a batch is over
            self.log_progress(self.trainer, "calibration", done)
