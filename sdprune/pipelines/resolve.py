"""The one place that knows where the embedded miniature's models lie."""

import os
from importlib.resources import files
from pathlib import Path

MINIATURE = "miniature"


def resolve(model: str, part: str) -> str:
    """Path or hub id that `model` stands for.

    Args:
        model: `miniature` (the models that come with this package), a local directory, or a hub id.
        part: which of the miniature's directories is meant: `pipeline` or `evaluator`.

    Returns:
        The directory `sdprune/mini/weights/<part>` for `miniature`, or `$SDPRUNE_MINIATURE/<part>` to try one that was
        trained anew; `model` unchanged otherwise.
    """
    if model != MINIATURE:
        return model
    if own := os.environ.get("SDPRUNE_MINIATURE"):
        return str(Path(own) / part)
    return str(files("sdprune") / "mini" / "weights" / part)
