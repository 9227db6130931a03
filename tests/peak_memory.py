"""The most memory that a command takes."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple


class Peak(NamedTuple):
    """In GiB, each at its own time."""

    own: float
    """Memory that cannot be read from a file again: the system needs so much, whatever else it does."""
    resident: float
    """With the pages of files that are mapped, which the system drops where memory is short; GNU time says this."""
    seconds: float


def peak(arguments: list[str]) -> Peak:
    """Of a command of sdprune, which must succeed."""
    started, highest = time.monotonic(), {"RssAnon": 0.0, "VmRSS": 0.0}
    running = subprocess.Popen([sys.executable, "-m", "sdprune", *arguments], stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        while running.poll() is None:
            try:
                lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
            except OSError:
                return
            for key, value in (line.split(":", 1) for line in lines):
                if key in highest:
                    highest[key] = max(highest[key], int(value.split()[0]) / 2**20)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    told = running.communicate()[1]
    watcher.join()
    assert running.returncode == 0, told[-2000:]
    return Peak(highest["RssAnon"], highest["VmRSS"], time.monotonic() - started)
