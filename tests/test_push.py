"""`sdprune push` against a server that speaks the hub's protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import fit, predict


class Hub(ThreadingHTTPServer):
    """The part of the hub that takes a commit: what was sent is in `files`, what was asked for in `created`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.refuses = False
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuses:
            return self._answer({"error": "You may not write here"}, 403)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self.server.address}/me/model"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            large = {True: "lfs", False: "regular"}
            names = [one["path"] for one in json.loads(body)["files"]]
            return self._answer(
                {
                    "files": [
                        {"path": one, "uploadMode": large[one.endswith(("safetensors", "png"))], "shouldIgnore": False}
                        for one in names
                    ]
                }
            )
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.address}/blob/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        assert self.path == "/api/models/me/model/commit/main", self.path
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        self._answer({"commitOid": "0" * 40, "commitUrl": f"{self.server.address}/me/model/commit/{'0' * 40}"})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: object, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch) -> Iterator[Hub]:
    """A hub that may be asked, of which this user has a token."""
    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the newer of its two protocols
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield made
    made.shutdown()
    made.server_close()


def contents(directory: Path) -> dict[str, bytes]:
    return {one.relative_to(directory).as_posix(): one.read_bytes() for one in directory.rglob("*") if one.is_file()}


def test_a_measured_model_is_sent_with_its_card_and_pictures(sdprune, server, tmp_path):
    """Every file as it is; the card names the repository, and shows the grid of the record of the same pruning."""
    assert sdprune(*predict(tmp_path)).code == 0
    pruned = tmp_path / "model"
    assert sdprune(*fit("prune", tmp_path, f"--model.directory={pruned}")).code == 0
    (record,) = tmp_path.glob("text_encoder-*/")
    told = sdprune("push", pruned, "me/model")
    assert (told.code, told.err) == (0, "")
    assert f"Sent: {server.address}/me/model" in told.out
    assert server.created == [{"name": "model", "organization": "me", "visibility": "private"}]
    sent, kept = dict(server.files), contents(pruned)
    card = sent.pop("README.md").decode()
    assert kept.pop("README.md").decode().replace("<this directory>", "me/model") == card
    assert sent == kept
    assert sent["grid.png"] == (record / "grid.png").read_bytes()
    assert f"(record `{record.name}`).](grid.png)" in card
    assert "this directory>" not in card
    assert 'DiffusionPipeline.from_pretrained("me/model")' in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    assert "@article{ramesh2024efficient," in card


@pytest.fixture(scope="module")
def card() -> str:
    return "---\nlicense: openrail++\n---\n# A model\n"


@pytest.fixture
def model(tmp_path, card) -> Path:
    """What a pipeline consists of at least."""
    directory = tmp_path / "model"
    (directory / "unet").mkdir(parents=True)
    (directory / "model_index.json").write_text("{}")
    (directory / "unet" / "model.compact.safetensors").write_bytes(b"some weights")
    (directory / "README.md").write_text(card)
    return directory


def test_a_public_repository_only_if_asked_for(sdprune, server, model):
    (model / ".cache").write_text("not to be sent")
    told = sdprune("push", "--public", model, "me/model")
    assert told.err == ""
    assert told.code == 0
    assert server.created[0]["visibility"] == "public"
    assert set(server.files) == {"README.md", "model_index.json", "unet/model.compact.safetensors"}


def test_what_is_refused_before_anything_is_sent(sdprune, server, model):
    def refused(*words: str, repository: str = "me/model", directory: Path = model) -> None:
        told = sdprune("push", directory, repository)
        assert (told.code, told.err.count("\n")) == (2, 1), told
        for word in words:
            assert word in told.err
        assert not server.created

    refused("'pruned'", "USER/NAME", repository="pruned")
    refused("no model_index.json", directory=model / "unet")
    (model / "unet" / "weights.bin").write_bytes(b"a pickle")
    refused("weights.bin", "remove it")
    (model / "unet" / "weights.bin").unlink()
    (model / "README.md").write_text("---\nlibrary_name: diffusers\n---\n")
    refused("names no licence", "license: openrail++")
    (model / "README.md").unlink()
    refused("no model card")


def test_a_hub_that_refuses_or_is_away(sdprune, server, model, monkeypatch):
    server.refuses = True
    told = sdprune("push", model, "me/model")
    assert (told.code, told.err.count("\n")) == (2, 1), told
    assert "me/model cannot be written on the hub" in told.err
    assert "hf auth login" in told.err
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    told = sdprune("push", model, "me/model")
    assert (told.code, told.err.count("\n")) == (2, 1), told
    assert "http://127.0.0.1:9 was not reached" in told.err
    assert "Nothing was sent." in told.err
