"""W&B: one run for each record, however often it is resumed or logged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import isnan
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from sdprune.errors import InputError
from sdprune.runs.record import Record, read_captions

PROMPTS = 32
"""Prompts that a run sends with both pictures, of which one of Stable Diffusion 2 has half a megabyte."""
_started: list[Any] = []
"""The W&B runs that were started here, which are ours to finish."""
_ended: list[str] = []
"""What `finish_all` said of those that were ended."""


def wandb_logger(
    output: Path, offline: bool, project: str | None, group: str | None, directory: Path | None
) -> WandbLogger:
    """A logger that continues the W&B run of a record, if there is one.

    It respects WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP, and WANDB_RUN_ID, which a sweep's agent sets.

    Args:
        output: where W&B keeps its files.
        offline: without a server.
        project: of W&B.
        group: of runs.
        directory: the record's, `<label>-<fingerprint>`; it gives the run its name and id.
    """
    environment = os.environ
    environment.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds that a server is waited for
    environment.setdefault("WANDB_DATA_DIR", str(output / "wandb"))  # copies of tables' pictures; else in the home
    label, _, fingerprint = (directory.name if directory else "").rpartition("-")
    output.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(
        project=project or environment.get("WANDB_PROJECT") or "sdprune",
        save_dir=output,
        offline=offline,
        name=None if environment.get("WANDB_NAME") else label or None,
        id=None if environment.get("WANDB_RUN_ID") else fingerprint or None,
        group=environment.get("WANDB_RUN_GROUP") or environment.get("WANDB_SWEEP_ID") or group,
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it, and only Lightning gives it
    return logger


def connect(loggers: Iterable[Logger]) -> None:
    """Start the run of every W&B logger, so that what is wrong shows before anything costly starts.

    Raises:
        InputError: nobody is logged in, or the server does not answer.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            running = wandb.run
            try:
                run: Any = logger.experiment
            except wandb.errors.Error as error:
                reason = " ".join(str(error).split())[:300].rstrip(".")
                hint = "Run `wandb login`, or use --wandb=offline and `wandb sync` later."
                raise InputError(f"W&B cannot be used: {reason}. {hint}") from error
            if running is None and run is wandb.run:
                _started.append(run)


def log_record(loggers: Iterable[Logger], record: Record, baseline: Record | None, model: str) -> None:
    """A finished record's numbers and grid, to every logger; those of its baseline under `dense/`.

    To W&B also the prompts that lost most, with both pictures, and a chart of each score against sparsity. All is read
    from the records, so that a run says the same whether it drew its images or found them finished.
    """
    numbers = _numbers(record.results)
    facts = {"record": record.facts, "directory": record.directory.name, "model": model}
    verdicts = {f"verdicts/{name}": one["verdict"] for name, one in record.results.get("verdicts", {}).items()}
    if baseline is not None:
        numbers |= {f"dense/{key}": value for key, value in _numbers(baseline.results).items()}
        facts["dense_directory"] = baseline.directory.name
    picture = record.directory / "grid.png"
    for logger in loggers:
        logger.log_hyperparams(facts)
        logger.log_metrics(numbers, step=0)
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(verdicts)
            if "infeasible" not in record.results:
                logger.experiment.log({"prompts": _prompts(record, baseline), **_curves(record, baseline)})
        if hasattr(logger, "log_image") and picture.exists():
            logger.log_image("samples", [str(picture)], step=0)
        logger.save()


def _prompts(record: Record, baseline: Record | None) -> Any:
    """A table of prompts with both pictures, scores, and losses, which are dense minus pruned; greatest losses first.

    They are ordered by the first score that has losses: the CLIP score, unless it was not measured.
    """
    import wandb

    table, pictures = _captions(record), {"pruned" if baseline else "picture": record}
    scores = list(table.columns[3:])
    if baseline is not None:
        pictures = {"dense": baseline, **pictures}
        before = _captions(baseline)
        compared = [one for one in scores if f"{one}_diff" in record.results["comparison"] and one in before]
        compared.sort(key=lambda name: name != "clip_score")
        table = table.merge(before[["file_name", *compared]], "left", on="file_name", suffixes=("", " of dense"))
        for name in compared:
            table[f"{name} lost"] = table[f"{name} of dense"] - table[name]
        if compared:
            table = table.sort_values(f"{compared[0]} lost", ascending=False, kind="stable")
        scores = [one for name in scores for one in (name, f"{name} of dense", f"{name} lost") if one in table]
    shown = wandb.Table(columns=["prompt", *pictures, *scores])
    for row in table.head(PROMPTS).to_dict("records"):
        paths = [one.image_path(row["file_name"]) for one in pictures.values()]
        found = [wandb.Image(str(path)) if path.is_file() else None for path in paths]
        shown.add_data(row["caption"], *found, *(None if isnan(row[name]) else row[name] for name in scores))
    return shown


def _captions(record: Record) -> Any:
    try:
        return read_captions(record.directory)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{record.directory / 'images.csv'} is missing or damaged: delete results.json beside it and run again; "
            "images are kept."
        ) from error


def _curves(record: Record, baseline: Record | None) -> dict[str, Any]:
    """A chart of each score against the zeros that were reached.

    Each has the points of this run and of its baseline. W&B draws those of all runs of a page into one chart, since
    their keys are the same.
    """
    import wandb

    runs = [(one.directory.name, one.results) for one in (baseline, record) if one is not None]
    charts = {}
    for name in flat(runs[-1][1]["metrics"]):
        if not name.endswith("_se"):
            points = wandb.Table(columns=["zeros", "nominal sparsity", name, "run"])
            for run, results in runs:
                sparsity = results["sparsity"]
                if name in results["metrics"]:
                    zeros = sparsity["prunable"]["zero_fraction"]
                    points.add_data(zeros, sparsity["nominal"], results["metrics"][name], run)
            charts[f"curves/{name}"] = wandb.plot.scatter(points, "zeros", name, title=f"{name} against sparsity")
    return charts


def log_search(loggers: Iterable[Logger], record: Record) -> None:
    """What a finished search came to, to every logger."""
    search = record.results["search"]
    kept = {name: search[name] or {} for name in ("answer", "also", "images")}
    for logger in loggers:
        logger.log_hyperparams({"record": record.facts, "directory": record.directory.name})
        logger.log_metrics(flat({"search": kept}), step=0)
        logger.save()


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    if "infeasible" in results:
        return {"infeasible": 1.0}
    return flat({key: results[key] for key in ("metrics", "comparison", "images", "sparsity", "speed")})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested mapping, keyed `a/b/c`."""
    result: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            result[f"{prefix}{key}"] = value
    return result


def finish_all(failed: bool) -> list[str]:
    """End the runs that were started here; where each can be seen, or how it gets to the server."""
    lines = []
    while _started:
        run = _started.pop()
        lines.append(f"wandb sync {run.settings.sync_dir}" if run.offline else str(run.url))
        run.finish(exit_code=int(failed))
    _ended.extend(lines)
    return lines


def take_ended() -> list[str]:
    """What `finish_all` has said since the last call."""
    lines = list(_ended)
    _ended.clear()
    return lines
