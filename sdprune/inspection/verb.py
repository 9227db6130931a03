"""`sdprune inspect`."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path

from sdprune.files import require_writable, write_json
from sdprune.inspection.facts import inspect
from sdprune.inspection.model import find_family
from sdprune.inspection.table import lines_of
from sdprune.inspection.usage import BYTES, INSPECT


def run(arguments: Sequence[str]) -> int:
    """Do what these arguments of `sdprune inspect` say, and return the exit code.

    Raises:
        InputError: unknown options, a model that cannot be had, or that is damaged.
    """
    options = INSPECT.parse(arguments)
    if options.out:
        require_writable(Path(options.out).absolute().parent, "--out")
    family = find_family(options.model, options.revision, options.pipeline)
    sparsities = {"text": 0.475, "denoiser": 0.35} | dict(options.sparsity)
    collects = gc.isenabled()
    gc.disable()  # it looks at a million objects again and again, all of which stay, for a sixth of the time
    try:
        found = inspect(
            family, sparsities, options.layers, options.steps or family.own_steps, int(options.memory * 2**30),
            options.captions, BYTES[options.precision],
        )  # fmt: skip
    finally:
        if collects:
            gc.enable()
    facts = {"model": options.model, **found}
    if options.out:
        write_json(Path(options.out), facts)
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines_of(facts)), flush=True)
    return 0
