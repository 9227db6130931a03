"""`sdprune lossless`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdprune.errors import InputError
from sdprune.inspection.model import find_family
from sdprune.lossless.make import lossless
from sdprune.lossless.table import lines_of
from sdprune.lossless.usage import LOSSLESS
from sdprune.outside import reading
from sdprune.pipelines import Sampling


def run(arguments: Sequence[str]) -> int:
    """Do what these arguments of `sdprune lossless` say, and return the exit code.

    Raises:
        InputError: unknown options, a model that cannot be had or is damaged, pictures that differ.
    """
    options = LOSSLESS.parse(arguments)
    if options.out is None:
        LOSSLESS.error("--out is missing: give a new directory")
    if options.tables and options.steps is None:
        LOSSLESS.error("--tables needs the number of denoising steps that they are for: give --steps")
    cls = type(find_family(options.model, options.revision, options.pipeline))
    family = cls(options.model, revision=options.revision, variant=options.variant)
    size = options.size
    if size is not None and size % 8:
        raise InputError(f"--size is {size}: give a multiple of 8 pixels, such as {8 * max(1, round(size / 8))}.")
    sampling = _Sampling(options.steps or 2, 5.0, size, size, options.scheduler)
    dtype, device = getattr(torch, options.dtype), _device(options.device)
    facts = lossless(family, Path(options.out), sampling, options.keep, options.tables, dtype, device)
    print("\n".join(lines_of(facts)), flush=True)
    return 0


class _Sampling(Sampling):
    option = "--size"


def _device(name: str) -> torch.device:
    with reading(f"--device is {name!r}, which is not there", "Give cpu, or cuda where there is a GPU."):
        torch.empty(0, device=name)
        return torch.device(name)
