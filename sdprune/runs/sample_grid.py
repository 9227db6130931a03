"""Pictures of a few fixed prompts."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer

from sdprune.pictures import grid
from sdprune.runs.png import read_png, save_png


class SampleGrid(Callback):
    """Draws the sample prompts on the first process, and shows them in `grid.png` below those of the baseline."""

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw and write, where the record lacks them."""
        if "samples" not in pl_module.todo or not trainer.is_global_zero:
            return
        record, baseline, samples = pl_module.record, pl_module.baseline, pl_module.samples
        if record.finished:  # until the new ones are there
            record.finish({**record.results, "samples": None})
        (record.directory / "grid.png").unlink(missing_ok=True)
        if samples:
            drawn = pl_module.draw_samples(samples)
            for number, (pixels, finite) in enumerate(drawn):
                save_png(record.sample_path(number), pixels, finite)
            rows = {"pruned" if pl_module.reports else "dense": [pixels for pixels, _ in drawn]}
            if baseline is not None and baseline.results["samples"] == samples:
                before = [read_png(baseline.sample_path(number)).pixels for number in range(len(samples))]
                rows = {"dense": before, **rows}
            save_png(record.directory / "grid.png", grid(rows, samples))
