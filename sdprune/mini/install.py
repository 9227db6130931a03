"""Put a miniature that was trained anew into the package: `python -m sdprune.mini.install runs/miniature`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sdprune.errors import InputError
from sdprune.pipelines.resolve import SHIPPED, untrained

_CONTENT = ("pipeline", "evaluator", "examiner", "training.json")


def install(source: Path, target: Path = SHIPPED) -> None:
    """Replace the package's miniature, as a whole or not at all.

    Args:
        source: a directory that the six stages of configs/mini/ were trained into.
        target: the package's own.

    Raises:
        InputError: something is missing or only partly trained, or the package cannot be written.
    """
    missing = [name for name in _CONTENT if not (source / name).exists()]
    if missing:
        raise InputError(
            f"{source} holds no trained miniature, it has no {', '.join(missing)}: run sdprune fit with the stages in "
            "configs/mini/, vae, text_encoder, grounding, evaluator, unet and examiner, in this order."
        )
    if partly := untrained(source):
        raise InputError(
            f"The miniature in {source} is only partly trained, {', '.join(partly)}: finish it by the same commands. "
            f"To try it as it is, set SDPRUNE_MINIATURE={source}."
        )
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        for name in _CONTENT:
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy
            copy(source / name, new / name)
        os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old)
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror}. Set SDPRUNE_MINIATURE={source} instead.") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sdprune.mini.install",
        description="Replace the miniature that comes with sdprune by one that was trained anew. The shipped one comes "
        "back with git checkout sdprune/mini/weights, or by installing sdprune again.",
    )
    parser.add_argument("directory", type=Path, help="where the stages were trained into, such as runs/miniature")
    source = parser.parse_args(arguments).directory
    try:
        install(source)
    except InputError as error:
        print(f"sdprune: error: {error}", file=sys.stderr)
        return 2
    print(f"Installed: {source} is now the miniature, in {SHIPPED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
