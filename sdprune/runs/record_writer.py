"""Writes what a run came to into its record."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from lightning import Callback, Trainer

from sdprune.processes import Processes
from sdprune.runs.record import clock, versions


class RecordWriter(Callback):
    """At the end of a run writes rows, captions and results, on the first process; a record that lacked only scores or
    samples keeps the rest."""

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write; collective."""
        if not pl_module.todo:
            return
        device = trainer.strategy.root_device
        generated = trainer.strategy.reduce(torch.tensor(pl_module.generated, device=device), reduce_op="sum")
        if trainer.is_global_zero:
            results: dict[str, Any] = {} if "images" in pl_module.todo else pl_module.record.results
            if "images" in pl_module.todo:
                results |= self._of_images(pl_module, int(generated), trainer)
            if "scores" in pl_module.todo:
                results |= self._of_scores(pl_module, results)
            pl_module.record.finish({**results, "samples": pl_module.samples})
        Processes().barrier()

    def _of_images(self, module: Any, generated: int, trainer: Trainer) -> dict[str, Any]:
        """What only a run that draws knows."""
        examples, plan = module.data.examples, module.plan
        device = trainer.strategy.root_device
        busy = sum(module.seconds[name] for name in ("generation", "files", "scoring"))
        return {
            "fingerprint": module.record.fingerprint,
            "label": module.record.directory.name,
            "model": module.pipeline.name,
            "n": len(examples),
            "metrics": {},
            "remarks": {},
            "comparison": {},
            "verdicts": {},
            "compared": {},
            "images": module.invalid.summary(list(examples["id"])),
            "budget": plan.describe_budget(),
            "roles": {name: component.role for name, component in module.pipeline.prunable.items()},
            "sparsity": plan.account(module.reports),
            "pruning": {name: report.summary() for name, report in module.reports.items()},
            **(
                {"narrowing": {n: report.summary() for n, report in module.narrowed.items()}} if module.narrowed else {}
            ),
            "data": module.facts_of_data,
            "protocols": {},
            "scored": {},
            "speed": {
                "seconds": time.perf_counter() - self.started,
                "finished": clock(time.time()),
                **{f"{name}_seconds": value for name, value in module.seconds.items()},
                "generated": generated,
                "images_per_second": generated / busy if generated else 0.0,
                "processes": trainer.world_size,
                "peak_memory_bytes": peak_memory(device),
            },
            "device": str(device.type),
            "versions": versions(),
        }

    def _of_scores(self, module: Any, results: dict[str, Any]) -> dict[str, Any]:
        """What was measured now, beside what was measured before."""
        scoring, data = module.scoring, module.data
        draws = "images" in module.todo
        rows = scoring.save(module.invalid.rows() if draws else {})
        module.record.save_captions(data.examples, module.scores.per_image(rows), keep=not draws)
        values = {**results["metrics"], **module.values}
        remarks = {score.name: found for score in module.scores.scores if (found := score.remarks(values, rows))}
        stale = {score.name for score in scoring.stale_scores}
        kept = {name: lines for name, lines in results["remarks"].items() if name not in stale}
        compared = {name: one for name, one in results.get("compared", {}).items() if name not in stale}
        differences = {name: value for one in compared.values() for name, value in one["values"].items()}
        dense = {"dense": results["comparison"]["dense"]} if differences else {}
        return {
            "metrics": values,
            "compared": compared,
            "comparison": {**dense, **differences},
            "verdicts": {name: one for name, one in results["verdicts"].items() if name in compared},
            "remarks": {**kept, **remarks},
            "protocols": {**results["protocols"], **self._protocols(module)},
            "scored": {**results["scored"], **{score.name: scoring.facts(score) for score in scoring.stale_scores}},
        }

    def _protocols(self, module: Any) -> dict[str, Any]:
        """By score, how it was measured: n, the network and its protocol, and the reference."""
        references = module.references.describe(module.data)
        found: dict[str, Any] = {}
        for score in module.scores.scores:
            network = {} if score.extractor is None else {"protocol": score.extractor.name}
            reference = {"reference": references[score.name]} if score.name in references else {}
            n = {"n": len(module.data.examples)}
            found[score.name or type(score).__name__] = {**score.describe(), **network, **n, **reference}
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
