"""Who makes what several runs want at the same moment: one of them, while the others wait for it.

Locks belong to the operating system, so that those of a run that dies are free at once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Everyone = Callable[[Any], Any]
"""Hands the first process's value to all processes of a run; collective."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_POLL = 2.0  # seconds between two looks; the processes of a run must hear of each other before they give up
_held: list[Claim] = []


def alone(value: Any) -> Any:
    """Everyone, in a run of one process."""
    return value


class Claim:
    """The right to make something.

    Args:
        path: of the lock; equal for all that want the same thing.
        everyone: reaches the run's other processes. Only the first one holds the lock.
        first: whether this is the first process.
    """

    def __init__(self, path: Path, everyone: Everyone = alone, first: bool = True) -> None:
        self.path, self.everyone, self.first = path, everyone, first
        self._lock: FileLock | None = None

    def acquire(self, done: Callable[[], bool]) -> bool:
        """Wait until it is either made by somebody or this run's to make; collective.

        Args:
            done: whether it has been made; asked on the first process.

        Returns:
            Whether this run is to make it, and to `release` the claim afterwards.
        """
        told = False
        while True:
            state = self.everyone(self._try(done) if self.first else None)
            if state != "taken":
                return state == "mine"
            if self.first and not told:
                print(f"Another run is making {self.path.stem}: waiting for it.", flush=True)
            told = True

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            _held.remove(self)

    def _try(self, done: Callable[[], bool]) -> str:
        if done():
            return "done"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(self.path)
            lock.acquire(timeout=_POLL)
        except Timeout:
            return "taken"
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            print(f"{self.path.parent} is on a file system without locks: start one run at a time.", flush=True)
            return "mine"
        self._lock = lock
        _held.append(self)
        if done():  # made while we waited for the lock
            self.release()
            return "done"
        return "mine"


def _lock(path: Path) -> FileLock:
    try:  # newer versions else mark the file instead, and a mark outlives whoever is killed
        return FileLock(path, fallback_to_soft=False)
    except TypeError:
        return FileLock(path)


def release_all() -> None:
    """Let go of everything this process holds, after a failure."""
    for claim in list(_held):
        claim.release()
