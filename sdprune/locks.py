"""Who makes what several runs want at the same moment: one of them, while the others wait for it.

Locks belong to the operating system, so that those of a run that dies are free at once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sdprune.processes import Processes

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_POLL = 2.0  # seconds between two looks; the processes of a run must hear of each other before they give up
_held: list[RunLock] = []


class RunLock:
    """The right to make something; of a run's processes the first one holds it for all.

    Args:
        output: directory of what is made; the lock's file lies below it.
        name: of what is made.
        processes: of this run.
    """

    def __init__(self, output: str | Path, name: str, processes: Processes | None = None) -> None:
        self.path = Path(output) / ".locks" / f"{name}.lock"
        self.processes = processes or Processes()
        self._lock: FileLock | None = None

    def acquire(self, done: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it is made, or until this run may make it; collective.

        Args:
            done: whether it has been made; called on the first process.

        Returns:
            Whether this run is to make it, and to `release` the lock afterwards.
        """
        reported = False
        while True:
            state = self.processes.broadcast(self._try(done) if self.processes.is_first else None)
            if state != "taken":
                return state == "mine"
            if self.processes.is_first and not reported:
                print(f"Another run is making {self.path.stem}: waiting for it.", flush=True)
            reported = True

    @contextmanager
    def making(self, done: Callable[[], bool]) -> Iterator[bool]:
        """`acquire` for the length of a block."""
        try:
            yield self.acquire(done)
        finally:
            self.release()

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
            lock = _file_lock(self.path)
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


def _file_lock(path: Path) -> FileLock:
    try:  # newer versions else mark the file instead, and a mark outlives whoever is killed
        return FileLock(path, fallback_to_soft=False)
    except TypeError:
        return FileLock(path)


def release_all() -> None:
    """Let go of everything this process holds, after a failure."""
    for lock in list(_held):
        lock.release()
