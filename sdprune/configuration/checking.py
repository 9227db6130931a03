"""What can be known of commands before any of them runs: for sweeps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser

from sdprune.cli import SdpruneCLI
from sdprune.configuration.words import quoted
from sdprune.errors import InputError, cause
from sdprune.hub import offline
from sdprune.identity import code_of
from sdprune.modules import GenerationModule
from sdprune.pruning import InfeasibleError


class Checked(NamedTuple):
    """What can be said of a command before it runs."""

    fault: str | None = None
    """One line on what is wrong with it."""
    finished: bool = False
    """Whether its record is there, as far as local files tell."""
    numbers: list[str] = []  # noqa: RUF012 (never changed)
    """Names of its results' numbers, as W&B has them; one that ends with a slash stands for all that begin so."""


class _AllChecked(Exception):  # noqa: N818 (no error: it leaves LightningCLI's constructor before anything is run)
    def __init__(self, found: list[Checked]) -> None:
        self.found = found


class _Checker(SdpruneCLI):
    """Parses many commands with one parser, constructs what they name, and runs none of them; asks no hub."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.known: dict[str, Any] = {}
        with offline():
            raise _AllChecked([self._check(parser, words) for words in args])

    def _check(self, parser: LightningArgumentParser, words: Sequence[str]) -> Checked:
        try:
            super().parse_arguments(parser, words)
            made, config = parser.instantiate_classes(self.config)[words[0]], self.config[words[0]]
            model = made.model
            if not isinstance(model, GenerationModule):
                return Checked()
            model.pipeline = self.known.setdefault(str(config.model.init_args.pipeline), model.pipeline)
            model.pipeline.require([*model.options.prune, *model.options.narrow])
            data = self.known.setdefault(str(config.data), made.data)  # hashes the same files once
            finished = self._finished(model, data, str(config.trainer.precision or "32-true"))
            return Checked(None, finished, numbers_of(model))
        except SystemExit:
            return Checked("--help and --print_config cannot be given to a sweep")
        except Exception as error:
            return Checked(" ".join(str(cause(error, InputError) or error).split()) or type(error).__name__)

    @staticmethod
    def _finished(model: GenerationModule, data: Any, precision: str) -> bool:
        """Whether the record is there; not when that cannot be known without the hub or with files that are missing."""
        if not any(Path(model.output).glob("*/results.json")):
            return False
        try:
            model.resolve(data, precision)
            return model.record.finished
        except InfeasibleError:
            return model.infeasible_record().finished
        except InputError:
            return False


def check(commands: Sequence[Sequence[str]]) -> list[Checked]:
    """Find what is wrong with commands before any of them runs: faults of options, values, classes, components.

    Args:
        commands: each a verb and its options.
    """
    sys.argv[0] = sys.argv[0] or "sdprune"
    try:
        _Checker([quoted(words) for words in commands])
    except _AllChecked as checked:
        return checked.found
    raise AssertionError("LightningCLI parses its arguments in its constructor")


def numbers_of(module: GenerationModule) -> list[str]:
    """Names of the results' numbers, as W&B has them; one that ends with a slash stands for all that begin so."""
    names = ["sparsity/", "images/", "speed/"]
    for score in module.scores.scores:
        scores, differences = score.titles if not code_of(score) else ([""], [""])  # a user's may have any
        names += [f"metrics/{name}" for name in scores]
        names += [f"comparison/{name}" for name in differences if module.compares]
    return names
