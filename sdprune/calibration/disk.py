"""Whether what calibration writes finds room, before it starts."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdprune.calibration.progress import size_shown
from sdprune.errors import InputError
from sdprune.processes import Processes


class Need(NamedTuple):
    """What is written to one place."""

    path: Path
    size: int
    """Bytes."""
    what: str
    advice: str
    """What makes it less, or puts it elsewhere."""


def kept_need(size: int) -> Need:
    """What a process keeps of blocks.

    Args:
        size: in bytes.
    """
    return Need(
        Path(tempfile.gettempdir()), size, "for what blocks give",
        "Take fewer --data.calibration_n, set TMPDIR to a place that has more, or let every pass run the pipeline with "
        "--model.calibration.kept_gib=0",
    )  # fmt: skip


def statistics_need(path: Path, size: int) -> Need:
    """What the first process puts into the store.

    Args:
        path: of the store.
        size: in bytes.
    """
    return Need(path, size, "for statistics", "Put --model.store where there is more")


def require_space(needs: Sequence[Need], processes: Processes) -> None:
    """See that all processes of a machine together find room for what they write; collective.

    Args:
        needs: of this process.
        processes: of this run.

    Raises:
        InputError: a disk has too little space, on any machine.
    """
    machine = socket.gethostname()
    of_all = processes.all_gather((machine, list(needs)))
    found = _problem([need for other, own in of_all if other == machine for need in own])
    for problem in processes.all_gather(found):
        if problem:
            raise InputError(problem)


def _problem(needs: Sequence[Need]) -> str | None:
    """What is wrong, if a disk has too little space."""
    disks: dict[int, list[tuple[Path, Need]]] = {}
    for need in needs:
        if need.size:
            place = next(one for one in (need.path.absolute(), *need.path.absolute().parents) if one.exists())
            disks.setdefault(place.stat().st_dev, []).append((place, need))
    for own in disks.values():
        wanted, free = sum(need.size for _, need in own), shutil.disk_usage(own[0][0]).free
        if wanted <= free:
            continue
        sizes = Counter[tuple[Path, str]]()
        for _, need in own:
            sizes[need.path, need.what] += need.size
        listed = " and ".join(f"{size_shown(size)} in {path} {what}" for (path, what), size in sizes.items())
        advice = ". ".join(dict.fromkeys(need.advice for _, need in own))
        found = f"{size_shown(wanted)} of disk space, and {size_shown(free)} are free"
        return f"Calibration needs {found}: {listed}. {advice}."
    return None
