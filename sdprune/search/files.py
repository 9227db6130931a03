"""What a search keeps between two rounds: the score of every picture, and what pruning came to."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdprune.errors import InputError
from sdprune.files import read_json, replacing, write_json

_COLUMNS = ("prompts", "model", "position", "score")


def write_state(directory: Path, scores: Mapping[tuple[str, str], Sequence[float]], models: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        directory: of the search.
        scores: by the name of the model and the part of the prompts.
        models: facts of each pruned model, by name.
    """
    write_json(directory / "models.json", models)  # first: where all scores are there, a model is not pruned again
    with replacing(directory / "scores.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for (model, part), values in scores.items():
            writer.writerows([part, model, place, repr(value)] for place, value in enumerate(values))


def read_state(directory: Path) -> tuple[dict[tuple[str, str], list[float]], dict[str, Any]]:
    """Read what an interrupted search wrote; nothing where it wrote nothing.

    Raises:
        InputError: a file is damaged.
    """
    table, models = directory / "scores.csv", directory / "models.json"
    scores: dict[tuple[str, str], list[float]] = {}
    if not table.exists():
        return scores, {}
    try:
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                own = scores.setdefault((row["model"], row["prompts"]), [])
                if int(row["position"]) != len(own):
                    raise ValueError(f"position {row['position']} in place of {len(own)}")
                own.append(float(row["score"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{table} is damaged ({error}): delete it and run again; images are kept.") from error
    return scores, read_json(models)
