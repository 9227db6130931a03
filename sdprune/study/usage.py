"""The help and the flags of the study's verbs, which answer without importing what they need."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from sdprune.errors import InputError, unknown

SWEEP = """usage: sdprune sweep FILE [FILE ...] [--jobs=N] [--dry-run] [--option=value ...]

Run every cell of W&B sweep files (method: grid) here, without a server. Each cell is the command that `wandb agent`
would start, without --wandb; options given here are added to all of them. All cells are checked before the first one
starts. A finished cell is not run again, and one that failed is tried again, when the same command is given again. At
the end a table for each file shows the cells by the score that its `metric:` names. When the first three cells fail
alike, the sweep stops. FILE is a path, or the name of a sweep that comes with sdprune.

  sdprune sweep mini_methods_unet --data.n=64

  --jobs=N   run N cells at once, each job on its share of the cores; 1 by default. Bits of images depend on the number
             of threads: set OMP_NUM_THREADS to have the same with any number of jobs.
  --dry-run  check all cells and list their commands, run none; finished ones are marked. Asks no model hub

Exit code: 0 when every cell is done, 1 when one failed, 2 when one can be seen to be wrong before it runs.
"""
REPORT = """usage: sdprune report DIR [DIR ...] [--out=DIR] [--reference=FILE]

Make the study's tables and figures from the runs below these directories: report.html (one page with everything in it),
report.md, figures/ and tables/*.csv. Runs of unlike prompts, noise, sampling or protocol are reported apart.
Damaged and unfinished runs are left out, and named.

  --out=DIR          where to; <first DIR>/report by default
  --reference=FILE   results of others to stand beside, a CSV with text_method, unet_method, text_sparsity,
                     unet_sparsity, fid and clip_score; the published ones stand beside runs of SD2 anyway
"""


class Flags(argparse.ArgumentParser):
    """The flags of a verb, with `=` or a space before the value.

    Args:
        verb: its name.
        others: further options that the verb takes, for suggestions.
    """

    def __init__(self, verb: str, others: Sequence[str] = ()) -> None:
        super().__init__(prog=f"sdprune {verb}", add_help=False, allow_abbrev=False)
        self.others = others

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The values of the flags, and the words that are none.

        Raises:
            InputError: a flag that there is not, or one without its value.
        """
        found, places = self.parse_known_args(words)
        for word in places:
            if word.startswith("-"):
                flags = [name for action in self._actions for name in action.option_strings]
                raise unknown(f"option of {self.prog}", word.partition("=")[0], [*flags, *self.others])
        return found, places

    def error(self, message: str) -> NoReturn:
        """Raise InputError, in one line."""
        line = re.sub(r"^argument (\S+): (expected one argument)?", r"\1 ", message).rstrip()
        wants = f"wants a value, as in {line}=VALUE" if message.endswith("expected one argument") else ""
        raise InputError(f"{line} {wants}".rstrip() + ". See --help.")


def path(value: str) -> str:
    """A value that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return value


def jobs(value: str) -> int:
    """A number of jobs."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"is {value!r}: give a number of 1 or more, as in --jobs=2")
    return int(value)
