"""The one exception for input that the user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Bad input, told in one line: the value, the choices, the next step. The command line exits with 2."""


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
