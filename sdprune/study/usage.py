"""The flags and the help of the study's verbs, which answer without importing what they need."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

from sdprune.errors import InputError, as_share, unknown

CELL_OPTIONS = ("config", "seed_everything", "trainer", "model", "data", "wandb", "wandb_project", "wandb_group")
"""Options of `fit` and `predict` without a dot; here, since importing those verbs takes seconds."""


LAYER_KINDS = ("Linear", "Conv2d", "Conv1D")
"""As in `sdprune.pruning.targets`, which imports torch."""


class Verb(argparse.ArgumentParser):
    """The arguments of a verb; `str` gives its help."""

    def __str__(self) -> str:
        return self.format_help()

    def parse(self, words: Sequence[str], others: Sequence[str] = ()) -> argparse.Namespace:
        """Parse; options may stand between positional arguments, `others` are further ones to suggest.

        Raises:
            InputError: an unknown option, or a value that is wrong or missing.
        """
        found, rest = self.parse_known_intermixed_args(words)
        for word in rest:
            help_flag, *flags = [action.option_strings[-1] for action in self._actions if action.option_strings]
            choices = [*flags, *(f"--{name}" for name in others), help_flag]
            raise unknown(f"option of {self.prog}", word.partition("=")[0], choices)
        return found

    def error(self, message: str) -> NoReturn:
        """Raise InputError, in one line."""
        raise InputError(f"{self.prog}: {message.removeprefix('argument ').rstrip('.')}. See {self.prog} --help.")


def path(value: str) -> str:
    """Accept a value that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("the path is empty")
    return value


def whole(value: str) -> int:
    """Accept a whole number of 1 or more."""
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of 1 or more, as in 2")
    return int(value)


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


SWEEP = Verb(
    "sdprune sweep", "sdprune sweep FILE [FILE ...] [--jobs N] [--dry-run] [--option=value ...]", allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Run every cell of W&B sweep files (method: grid) here, without a server. Each cell is the command that `wandb agent`
would start, without --wandb; options given here are added to all of them. All cells are checked before the first one
starts. A finished cell is not run again, and one that failed is tried again, when the same command is given again. At
the end a table for each file shows the cells by the score that its `metric:` names. When the first three cells fail
alike, the sweep stops.

  sdprune sweep mini_methods_unet --data.n=64

Exit code: 0 when every cell is done, 1 when one failed, 2 when one can be seen to be wrong before it runs.""",
)  # fmt: skip
SWEEP.add_argument("files", nargs="+", metavar="FILE", help="a path, or the name of a sweep that comes with sdprune")
SWEEP.add_argument(
    "--jobs", type=whole, default=1, metavar="N",
    help="run N cells at once, each on its share of the cores; 1 by default. Bits of images depend on the number of "
    "threads: set OMP_NUM_THREADS to have the same with any number of jobs.",
)  # fmt: skip
SWEEP.add_argument(
    "--dry-run", action="store_true",
    help="check all cells and list their commands, run none; finished ones are marked. It asks no model hub.",
)  # fmt: skip

REPORT = Verb(
    "sdprune report", "sdprune report DIR [DIR ...] [--out DIR] [--reference FILE]", allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Make the study's tables and figures from the runs below these directories: report.html (one page with everything in
it), report.md, figures/ and tables/*.csv. Runs of unlike prompts, noise, sampling or protocol are reported apart.
Damaged and unfinished runs are left out, and named.""",
)  # fmt: skip
REPORT.add_argument("directories", nargs="+", metavar="DIR", help="a directory with runs below it")
REPORT.add_argument("--out", type=path, metavar="DIR", help="where to; <first DIR>/report by default")
REPORT.add_argument(
    "--reference", type=path, metavar="FILE",
    help="results of others to stand beside: a CSV with text_method, unet_method, text_sparsity, unet_sparsity, fid "
    "and clip_score. The published ones stand beside runs of SD2 anyway.",
)  # fmt: skip

INSPECT = Verb(
    "sdprune inspect", "sdprune inspect MODEL [--json] [--out FILE] [--sparsity NAME=SHARE] [--layers KIND,...] ...",
    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Say what a model is made of and what pruning it costs, without its weights: components, blocks in the order in which
they run, layers by kind, tied weights, layers whose input depends on the timestep or on the text alone, layers that no
output depends on, the statistics that each criterion reads, and what given sparsities leave. Of a hub id only the
configuration files are fetched. What depends on what is found by following one prediction without numbers.""",
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
INSPECT.add_argument("--steps", type=whole, default=50, metavar="N", help="denoising steps; 50 by default")
INSPECT.add_argument(
    "--memory", type=positive, default=8.0, metavar="GIB", help="for the statistics of a pass; 8 GiB by default"
)
INSPECT.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of a hub id")
INSPECT.add_argument(
    "--pipeline", metavar="CLASS", help="a family of your own, MODULE.CLASS; by default the model's index decides"
)
