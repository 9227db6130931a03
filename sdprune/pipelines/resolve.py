"""The one place that knows where the embedded miniature's models lie, and whether they are fully trained."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

MINIATURE = "miniature"
SHIPPED = Path(str(files("sdprune") / "mini" / "weights"))
"""The miniature that comes with this package."""
RECIPE: Mapping[str, int] = MappingProxyType({
    "vae": 4_000, "text_encoder": 800, "grounding": 800, "evaluator": 1_500, "unet": 6_000, "examiner": 2_500,
})  # fmt: skip
"""Steps of each training stage, as in configs/mini/<stage>.yaml."""


def resolve(model: str, part: str) -> str:
    """Path or hub id that `model` stands for.

    Args:
        model: `miniature` (the models that come with this package), a local directory, or a hub id.
        part: which of the miniature's directories is meant: `pipeline` or `evaluator`.

    Returns:
        The directory `sdprune/mini/weights/<part>` for `miniature`, or `$SDPRUNE_MINIATURE/<part>` to try one that was
        trained anew; `model` unchanged otherwise. A warning says so once when that one is only partly trained.
    """
    if model != MINIATURE:
        return model
    directory = Path(os.environ.get("SDPRUNE_MINIATURE") or SHIPPED)
    _warn_if_partly_trained(directory)
    return str(directory / part)


def untrained(directory: Path) -> list[str]:
    """What a miniature's training.json lacks, such as `unet (10 of 6000 steps)`; nothing when training is complete.

    A directory without training.json was not made by the recipe, and nothing is known of it.
    """
    try:
        record = json.loads((directory / "training.json").read_text())
        done = {stage: int(record.get(stage, {}).get("steps", 0)) for stage in RECIPE}
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError):
        return ["training.json is damaged"]
    return [f"{stage} ({done[stage]} of {steps} steps)" for stage, steps in RECIPE.items() if done[stage] < steps]


@cache
def _warn_if_partly_trained(directory: Path) -> None:
    missing = untrained(directory)
    if missing and os.environ.get("LOCAL_RANK", "0") == "0":
        line = f"sdprune: warning: the miniature in {directory} is only partly trained: {', '.join(missing)}"
        print(line, file=sys.stderr, flush=True)
