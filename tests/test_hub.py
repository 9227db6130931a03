"""The model hub out of reach: told within seconds, and what is in its local cache serves all the same."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from command_lines import ROOT, predict

from sdprune.data import HubDataset
from sdprune.errors import InputError
from sdprune.metrics import ClipImageFeatures
from sdprune.pipelines import StableDiffusion

PATIENCE = 9
"""Seconds; huggingface_hub alone retries for 25."""


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """The hub may be asked, and its cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def serve(monkeypatch):
    """Let the hub have this address."""

    def point(address: str) -> str:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        return address

    return point


@pytest.fixture(params=["refused", "silent"])
def nowhere(request, serve) -> Iterator[str]:
    """The address of a port that nobody listens at, or of one where nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen()
        yield serve(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_predict_names_the_host_the_cache_and_the_way_out(sdprune, nowhere, tmp_path):
    start = time.monotonic()
    told = sdprune(*predict(tmp_path / "runs", "--model.pipeline.model=nobody/nothing"))
    assert time.monotonic() - start < PATIENCE
    assert told.code == 2
    assert told.err.count("\n") == 1, told.err
    for words in (
        f"'nobody/nothing' at revision 'main' is not in the local cache {tmp_path}/hub",
        f"the hub {nowhere} was not reached (",
        "--model.pipeline.model=DIR",
    ):
        assert words in told.err


@pytest.mark.parametrize("nowhere", ["refused"], indirect=True)
@pytest.mark.parametrize(
    "read",
    [lambda: ClipImageFeatures("nobody/clip").load("cpu"), lambda: HubDataset("nobody/captions", "train").load()],
    ids=["clip", "dataset"],
)
def test_whatever_is_asked_for_names_the_host(nowhere, read):
    start = time.monotonic()
    with pytest.raises(InputError, match=rf"nobody/\w+' is not in the local cache \S+, and the hub {nowhere} was not"):
        read()
    assert time.monotonic() - start < PATIENCE


@pytest.mark.parametrize("nowhere", ["refused"], indirect=True)
def test_a_cached_model_needs_no_hub(nowhere, miniature, tmp_path):
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--nobody--cached"
    shutil.copytree(miniature / "pipeline", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert StableDiffusion("nobody/cached").describe()["revision"] == commit


def test_a_hub_that_answers_is_believed(serve):
    """It says that there is no such model."""

    class Empty(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    serve(f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(InputError, match="'nobody/nothing' at revision 'main' cannot be had from the hub") as told:
        _ = StableDiffusion("nobody/nothing").files
    assert "not reached" not in str(told.value)
    server.shutdown()


def test_a_dry_run_asks_no_hub(sdprune, serve, monkeypatch, tmp_path):
    """The cells of a study of Stable Diffusion 2 are checked while every connection is noticed."""
    serve("http://127.0.0.1:9")
    monkeypatch.chdir(ROOT)
    (tmp_path / "other-0").mkdir()
    (tmp_path / "other-0" / "results.json").write_text("{}")  # so that it looks for finished cells
    tried: list[object] = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: tried.append(address))
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: tried.append(address))
    told = sdprune("sweep", "wandb_sweeps/study_text_encoder_wanda.yaml", "--dry-run", f"--model.output={tmp_path}")
    assert (told.code, told.err, tried) == (0, "", [])
    assert told.out.count("\n") == 12
    told = sdprune("sweep", "wandb_sweeps/study_unet.yaml", "--dry-run", "--model.prune.unett.sparsity=0.1")
    assert told.code == 2
    assert "Unknown component 'unett'. Did you mean 'unet'?" in told.err
    assert not tried
