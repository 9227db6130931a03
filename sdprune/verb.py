"""The arguments of a verb that has a parser of its own, which answers without importing what the verb needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from sdprune.errors import InputError, unknown


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
