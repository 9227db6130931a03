"""How far calibration is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class CalibrationState:
    """How far calibration is."""

    what: str
    """The component, and its statistics."""
    number: int
    """Number of the current pass, from 1; one more than `passes` when all are over."""
    passes: int
    """Number of passes that this run makes."""
    images: int
    """Number of calibration images in each pass."""
    done: float
    """Number of images that the current pass has been over, on all processes; parts are denoising steps."""
    counted: str = "images"
    """What is counted: images, or layers where errors of pruning are measured."""


class ProgressReport:
    """Counts passes, images and denoising steps, and reports each.

    Args:
        report: is called in every denoising step.
        passes: number of passes of this run.
        images: number of calibration images in each pass.
    """

    def __init__(self, report: Optional[Callable[[CalibrationState], None]], passes: int, images: int) -> None:
        self._report, self._passes, self._images = report, passes, images
        self._what, self._number, self._over, self._running = "", 0, 0.0, 0.0
        self._share = self._most = 0.0

    def begin_pass(self, what: str, over: int) -> None:
        """A pass begins, of which `over` images are behind us."""
        self._what, self._number, self._over, self._running = what, self._number + 1, over, 0.0
        self._tell()

    def begin_batch(self, images: int, steps: int) -> None:
        """A batch of so many images on all processes begins, which takes so many denoising steps."""
        self._running, self._share, self._most = 0.0, images / steps, images

    def step(self) -> None:
        """A denoising step is done."""
        self._running = min(self._most, self._running + self._share)
        self._tell()

    def end_batch(self, over: int) -> None:
        """The batch is over, and with it so many images of the pass."""
        self._over, self._running = over, 0.0
        self._tell()

    def measured(self, what: str, more: int, layers: int) -> None:
        """More layers have been pruned by themselves, of so many."""
        self._over += more
        if self._report is not None:
            self._report(CalibrationState(what, 1 + (self._over >= layers), 1, layers, self._over, "layers"))

    def begin_measuring(self, done: int) -> None:
        """So many layers were measured before."""
        self._over = done

    def close(self) -> None:
        """All passes are over."""
        self._number, self._over, self._running = self._passes + 1, 0, 0.0
        self._tell()

    def _tell(self) -> None:
        if self._report is not None and self._passes:
            done = min(self._images, self._over + self._running)
            self._report(CalibrationState(self._what, self._number, self._passes, self._images, done))


def size_shown(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
