"""The flags and the help of `inspect`."""

from __future__ import annotations

import argparse
import math

from sdprune.errors import InputError, as_share, unknown
from sdprune.verb import Verb, path, whole

LAYER_KINDS = ("Linear", "Conv2d", "Conv1D")
"""As in `sdprune.pruning.targets`, which imports torch."""
BYTES = {"32-true": 4, "bf16-true": 2, "16-true": 2}
"""Of a number, by the trainer's precision."""


def share_of(value: str) -> tuple[str, float]:
    """Accept NAME=SHARE."""
    name, _, number = value.partition("=")
    try:
        return name, as_share(name, float(number))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is no NAME=SHARE, as in unet=0.35") from error


def kinds(value: str) -> list[str]:
    """Accept kinds of layers, with commas between them."""
    found = value.split(",")
    for kind in found:
        if kind not in LAYER_KINDS:
            raise argparse.ArgumentTypeError(f"{unknown('kind of layer', kind, LAYER_KINDS)}")
    return found


def positive(value: str) -> float:
    """Accept a number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is no number above 0")
    return number


INSPECT = Verb(
    "sdprune inspect", "sdprune inspect MODEL [--json] [--out FILE] [--sparsity NAME=SHARE] [--layers KIND,...] ...",
    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Say what a model is made of and what pruning it costs, without its weights: components, blocks in the order in which
they run, layers by kind, tied weights, layers whose input depends on the timestep or on the text alone, layers that no
output depends on, the memory and the disk space that each criterion takes, and what given sparsities leave. Of a hub id
only the configuration files are fetched. What depends on what is found by drawing one picture without numbers.""",
)  # fmt: skip
INSPECT.add_argument("model", type=path, metavar="MODEL", help="a diffusers directory, a hub id, or miniature")
INSPECT.add_argument("--json", action="store_true", help="print JSON in place of tables")
INSPECT.add_argument("--out", type=path, metavar="FILE", help="write the JSON to a file too")
INSPECT.add_argument(
    "--sparsity", type=share_of, action="append", default=[], metavar="NAME=SHARE",
    help="what would be pruned of a component, or of all text encoders (text) or the denoiser (denoiser); may be given "
    "again. text=0.475 and denoiser=0.35, the study's, by default",
)  # fmt: skip
INSPECT.add_argument(
    "--layers", type=kinds, default=["Linear"], metavar="KIND,...",
    help="kinds of layers that are pruned: Linear (the default), Conv2d, Conv1D; or several with commas",
)  # fmt: skip
INSPECT.add_argument(
    "--steps", type=whole, metavar="N", help="denoising steps; by default as many as its pipeline takes"
)
INSPECT.add_argument(
    "--memory", type=positive, default=8.0, metavar="GIB", help="for the statistics of a pass; 8 GiB by default"
)
INSPECT.add_argument("--captions", type=whole, default=128, metavar="N", help="calibration captions; 128 by default")
INSPECT.add_argument(
    "--precision",
    choices=BYTES,
    default="32-true",
    help="the trainer's, in which the model would run; 32-true by default",
)
INSPECT.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of a hub id")
INSPECT.add_argument(
    "--pipeline", metavar="CLASS", help="a family of your own, MODULE.CLASS; by default the model's index decides"
)
