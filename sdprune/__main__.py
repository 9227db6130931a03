"""The command line. Help and version answer at once; everything else is imported when it is needed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from sysconfig import get_path
from types import TracebackType

from sdprune.errors import InputError, unknown
from sdprune.errors import cause as _cause

HELP = """usage: sdprune [--help] [--version]
               {fit,predict,search,playground,sweep,report,inspect,lossless,pack,unpack,push} ...

Find out how much of a text-to-image model can be pruned away before the pictures suffer.

  fit      --config FILE   prune a model and save it as a diffusers directory, or gather calibration statistics
  predict  --config FILE   prune in memory, draw images from captions, score them, write the record
  search   --config FILE   find and certify the sparsest model that is still as good as the dense one
  playground               show in a browser what pruning does to a prompt
  sweep    FILE ...        run every cell of W&B sweep files here, without a server
  report   DIR ...         show the runs in these directories on a page to explore; tables and figures for papers
  inspect  MODEL           say what a model is made of and what pruning it costs, without its weights
  lossless MODEL --out DIR copy a model without what no picture depends on: the same pictures to the bit
  pack     DIR --out DIR   copy a pruned model into compact files, without loss
  unpack   DIR --out DIR   make the plain files of compact ones again, byte for byte
  push     DIR USER/NAME   send a saved model with its card to the model hub

FILE is a path, or the name of a file that comes with sdprune: mini/predict, sd2/predict; of sweeps mini_sparsity.
Any value of a configuration can be given as an option after it:
  sdprune predict --config mini/predict --model.prune.unet.sparsity=0.35

  sdprune VERB --help      all options       sdprune VERB --config FILE --print_config    the whole configuration

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""
_APART = {  # verbs without a trainer: the module of their usage, and the function that runs them
    "sweep": ("sdprune.study.usage", "sdprune.study.sweep", "run"),
    "report": ("sdprune.study.usage", "sdprune.study.report", "run"),
    "inspect": ("sdprune.inspection.usage", "sdprune.inspection.verb", "run"),
    "lossless": ("sdprune.lossless.usage", "sdprune.lossless.verb", "run"),
    "pack": ("sdprune.storage.usage", "sdprune.storage.directory", "run_pack"),
    "unpack": ("sdprune.storage.usage", "sdprune.storage.directory", "run_unpack"),
    "push": ("sdprune.push", "sdprune.push", "run"),
}
VERBS = ("fit", "predict", "search", "playground", *_APART)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if first == "--version":
        from importlib.metadata import version

        print(f"sdprune {version('sdprune')}")
        return 0
    try:
        if first not in VERBS:
            raise unknown("verb", first, VERBS)
        if first in _APART:
            usage, module, function = _APART[first]
            if len(arguments) == 1 or {"-h", "--help"} & set(arguments):
                print(getattr(import_module(usage), first.upper()), end="")
                return 0
        from sdprune.configuration.quiet import quiet

        quiet()
        if first in _APART:
            return int(getattr(import_module(module), function)(arguments[1:]))
        from sdprune.cli import run

        run(arguments)
        return 0
    except (KeyboardInterrupt, Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:  # --help, --print_config
            return 0
        if _cause(error, KeyboardInterrupt):  # the trainer makes a SystemExit of it
            return _fail("interrupted; run the same command again to go on", 130)
        if isinstance(error, BrokenPipeError):  # whoever reads it, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        bad_input = _cause(error, InputError)
        full = _cause(error, OSError)
        if isinstance(full, OSError) and full.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {full.filename}" if full.filename else ""
            return _fail(f"failed: no space is left{where}: make some and run the same command again to go on", 1)
        if bad_input is None:
            import traceback

            failed, frames, place = _in_own_file(error) or (error, error.__traceback__, "")
            traceback.print_exception(type(failed), failed, frames, chain=failed is error)
            return _fail(f"failed: {place}{type(failed).__name__}: {' '.join(str(failed).split())}", 1)
        return _fail(f"error: {bad_input}", 2)


def _in_own_file(error: BaseException | None) -> tuple[BaseException, TracebackType, str] | None:
    """What failed in a file of the user's own, if anything did: the exception, its frames from there on, the place."""
    libraries = (str(Path(__file__).parent), get_path("stdlib"))
    while error is not None:
        first, place, frames = None, "", error.__traceback__
        while frames is not None:
            code = frames.tb_frame.f_code
            file = Path(code.co_filename)
            installed = {"site-packages", "dist-packages"} & set(file.parts) or str(file).startswith(libraries)
            if file.is_file() and not installed:
                shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
                first, place = first or frames, f"{shown}:{frames.tb_lineno} in {code.co_name}: "
            frames = frames.tb_next
        if first is not None:
            return error, first, place
        error = error.__cause__ or error.__context__
    return None


def _fail(text: str, code: int) -> int:
    """Print one line on standard error, and return the exit code."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)  # names of others stay in one line
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")
    if rank == "0":  # speaks for all
        print(f"sdprune: {line}", file=sys.stderr, flush=True)
    elif _together():  # what went wrong may be this process's own
        print(f"sdprune: process {rank}: {line}", file=sys.stderr, flush=True)
    return code


def _together() -> bool:
    """Whether the processes of a run have met, so that one may fail alone."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(main())
