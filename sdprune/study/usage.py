"""The flags and the help of the study's verbs, which answer without importing what they need."""

from __future__ import annotations

import argparse

from sdprune.verb import Verb, path, whole

CELL_OPTIONS = ("config", "seed_everything", "trainer", "model", "data", "wandb", "wandb_project", "wandb_group")
"""Options of `fit` and `predict` without a dot; here, since importing those verbs takes seconds."""


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
    "sdprune report", "sdprune report DIR [DIR ...] [--out DIR] [--reference FILE] [--single-file]", allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Show the runs below these directories: report.html (a page to explore in a browser, from disk and without a network),
its pictures/, and for papers report.md, figures/ and tables/*.csv, with the study's own. Runs of unlike prompts, noise,
sampling or protocol are reported apart. Damaged and unfinished runs are left out, and named.""",
)  # fmt: skip
REPORT.add_argument("directories", nargs="+", metavar="DIR", help="a directory with runs below it")
REPORT.add_argument("--out", type=path, metavar="DIR", help="where to; <first DIR>/report by default")
REPORT.add_argument(
    "--reference", type=path, metavar="FILE",
    help="results of others to stand beside: a CSV with text_method, unet_method, text_sparsity, unet_sparsity, fid "
    "and clip_score. The published ones stand beside runs of SD2 anyway.",
)  # fmt: skip
REPORT.add_argument(
    "--single-file", action="store_true",
    help="put figures and sample pictures into report.html itself, smaller where many; those of captions stay out",
)  # fmt: skip
