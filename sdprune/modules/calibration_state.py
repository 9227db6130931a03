"""How far calibration is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CalibrationState:
    """How far calibration is."""

    what: str
    """The components, and the statistics of each."""
    number: int
    """Number of the current pass, from 1; one more than `passes` when all are over."""
    passes: int
    """Number of passes that this run makes."""
    images: int
    """Number of calibration images in each pass."""
    done: float
    """Number of images that the current pass has been over, on all processes; parts are denoising steps."""


class CalibrationWatch:
    """Counts passes, batches and denoising steps, and reports each.

    Args:
        batches: of the current pass that are over, when asked.
    """

    def __init__(self, batches: Callable[[], int]) -> None:
        self._batches = batches
        self._report: Callable[[CalibrationState], None] | None = None
        self._what, self._number, self._passes = "", 1, 0
        self._size, self._share = 0, 0.0

    def start(self, report: Callable[[CalibrationState], None], images: int, batch_size: int) -> None:
        """Report now and from now on.

        Args:
            report: is called in every denoising step.
            images: number of calibration images.
            batch_size: number of them in a batch.
        """
        self._report, self._images, self._batch_size = report, images, batch_size
        self._tell()

    def begin_pass(self, what: str, left: int, over: int) -> None:
        """A pass begins: `left` are to come, this one included, and `over` are behind us."""
        self._what, self._number, self._passes, self._size = what, over + 1, over + left, 0
        self._tell()

    def begin_batch(self, images: int, steps: int) -> None:
        """A batch of so many images on all processes begins, which takes so many steps of a model."""
        self._size, self._share, self._step = images, 0.0, 1 / steps

    def step(self) -> None:
        """A step of a model is done."""
        self._share = min(1.0, self._share + self._step)
        self._tell()

    def end_batch(self) -> None:
        """The batch is over."""
        self._size = 0
        self._tell()

    def _tell(self) -> None:
        if self._report is not None and self._passes:
            done = min(self._images, self._batches() * self._batch_size + self._share * self._size)
            self._report(CalibrationState(self._what, self._number, self._passes, self._images, done))
