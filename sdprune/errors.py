"""The one exception for input that the user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Any


class InputError(ValueError):
    """Bad input, described in one line: the value, the choices, the next step. The command line exits with 2."""


def unknown(kind: str, value: object, choices: Iterable[object]) -> InputError:
    """`Unknown criterion 'Magnitud'. Did you mean 'Magnitude'? Choices: ...`, for the caller to raise."""
    names = [str(choice) for choice in choices]
    by_lower = {name.lower(): name for name in reversed(names)}
    close = get_close_matches(str(value).lower(), by_lower, n=1)
    hint = f" Did you mean {by_lower[close[0]]!r}?" if close else ""
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return InputError(f"Unknown {kind} {str(value)!r}.{hint} Choices: {shown or 'none'}.")


def cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The exception of a kind behind another, or that one itself: libraries wrap what a constructor raises."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def as_share(option: str, value: Any) -> float:
    """A share, of any library's number type, as a float. Raises InputError for what is no number from 0 to 1."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{option} is {value!r}: give a number between 0 and 1, as in 0.35.")
    share = float(value)
    if not 0 <= share <= 1:  # also catches NaN
        hint = f"; for {share:g} %, write {share / 100:g}" if 1 < share <= 100 else ", as in 0.35"
        raise InputError(f"{option} is {value}: give a share between 0 and 1{hint}.")
    return share
