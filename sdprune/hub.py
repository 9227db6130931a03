"""The model hub: it is used where it answers within seconds, and else only its local cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Thread

from sdprune.errors import InputError
from sdprune.outside import reading, reason

_PATIENCE = 5.0
"""Seconds that the hub has to answer; libraries that wait for it retry for minutes."""


@contextmanager
def asking_hub(what: str, then: str) -> Iterator[None]:
    """Raise InputError for whatever a library raises when it asks the hub.

    Args:
        what: the request, such as `Model 'a/b'`.
        then: the next step.

    Raises:
        InputError: what the hub answered, or that it does not answer and the local cache lacks `what`.
    """
    from huggingface_hub import constants

    silence = _silence()
    if silence is None:
        with reading(f"{what} cannot be had from the hub", f"Check its name. {then}"):
            yield
        return
    with reading(f"{what} in the local cache {constants.HF_HUB_CACHE} cannot be used", then), offline():
        try:
            yield
        except OSError as error:
            if error.errno is not None:  # of the disk; libraries raise without for what is not in the cache
                raise
            raise InputError(
                f"{what} is not in the local cache {constants.HF_HUB_CACHE}, and the hub {constants.ENDPOINT} "
                f"{silence}. {then}"
            ) from error


def require_hub(done: str) -> None:
    """Check that the hub answers.

    Args:
        done: a sentence, what was done so far.

    Raises:
        InputError: it does not.
    """
    from huggingface_hub import constants

    silence = _silence()
    if silence is not None:
        raise InputError(f"The hub {constants.ENDPOINT} {silence}. {done}")


@contextmanager
def offline() -> Iterator[None]:
    """Let no library ask the hub."""
    from huggingface_hub import constants

    places = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]


def _silence() -> str | None:
    """Why the hub is not used, as a clause; None where it answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "is not asked (HF_HUB_OFFLINE is set: unset it to connect)"
    return _silence_of(constants.ENDPOINT)


@cache
def _silence_of(endpoint: str) -> str | None:
    from huggingface_hub import get_session

    found: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_PATIENCE)
            found.append(None)
        except Exception as error:  # of whichever HTTP library
            found.append(f"was not reached ({reason(error)})")

    asking = Thread(target=ask, daemon=True)  # looking up a host's name heeds no timeout
    asking.start()
    asking.join(_PATIENCE + 1)
    return found[0] if found else f"was not reached (no answer in {_PATIENCE:g} s)"
