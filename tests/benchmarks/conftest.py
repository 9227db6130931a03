"""What benchmarks share: at full size all cores, and the trained miniature."""

import os
from pathlib import Path

import pytest
import torch

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"


@pytest.fixture
def threads(one_thread):
    """Where time is taken, all cores work."""
    if FULL:
        torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def runs(request, tmp_path, monkeypatch):
    """Where models, records and statistics lie; what is not the full benchmark takes the untrained miniature."""
    if not FULL:
        request.getfixturevalue("miniature")
        return tmp_path
    monkeypatch.delenv("SDPRUNE_MINIATURE", raising=False)
    return Path(os.environ.get("SDPRUNE_BENCHMARK_RUNS") or tmp_path)
