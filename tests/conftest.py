"""What all tests share: one thread, no network, and an untrained miniature."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start; bits depend on it
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Path:
    """An untrained miniature that `miniature` stands for, and a cache of its own for the embedded world."""
    from sdprune.mini.models import save_random

    directory = tmp_path_factory.mktemp("miniature")
    save_random(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDPRUNE_MINIATURE", str(directory))
        patch.setenv("SDPRUNE_CACHE", str(directory / "cache"))
        yield directory


class Told(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def sdprune(miniature, capfd):
    """Run a command line in this process."""
    from sdprune.__main__ import main

    def run(*arguments: object) -> Told:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Told(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def chromium():
    """A headless browser, driven by Playwright; tests that want it are skipped where there is none."""
    reason = "there is no playwright: pip install '.[test]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
