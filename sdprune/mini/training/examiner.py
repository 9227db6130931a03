"""The stage of the examiner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sdprune.mini.examiner import Examiner, disturbed, examiner_loss
from sdprune.mini.training.stage import Stage


class ExaminerStage(Stage):
    """The detector that reads pictures, on disturbed ones, so that it reads those of a decoder too."""

    name = "examiner"

    def configure_model(self) -> None:
        """Build it, or read the one to resume."""
        if hasattr(self, "model"):
            return
        self.build(Examiner.load(self.part("examiner")).requires_grad_() if self.resume else Examiner())

    def loss(self, pictures: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """The detector's own, on disturbed pictures."""
        seen = [self.trainer.datamodule.scenes[i] for i in index.tolist()]  # type: ignore[attr-defined]
        return examiner_loss(self.model(disturbed(pictures)), seen)

    def save(self, model: Any) -> Path:
        """Save it alone."""
        model.save(self.weights / "examiner")
        return self.weights / "examiner"
