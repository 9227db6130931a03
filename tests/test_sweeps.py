"""Every sweep through the W&B agent's own code: the commands that it makes parse, and one real agent runs a trial."""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from coco_files import write_coco
from wandb import wandb_agent
from wandb.sdk.launch.sweeps.utils import load_sweep_config

import sdprune.pruning

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "wandb_sweeps").glob("*.yaml"))


def grid_point(sweep: dict[str, Any], which: int) -> dict[str, Any]:
    """The first (0) or last (-1) values of a sweep's parameters."""
    values = {name: given.get("values", [given.get("value")]) for name, given in sweep["parameters"].items()}
    return {name: choices[which] for name, choices in values.items()}


def agent_command(sweep: dict[str, Any], point: dict[str, Any], monkeypatch, tmp_path: Path) -> list[str]:
    """What the agent would start for a grid point: its own code, except for the start."""
    started = []
    monkeypatch.setattr(
        wandb_agent, "AgentProcess", lambda command, **_: started.append(command) or contextlib.nullcontext()
    )
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(name, value)  # the agent sets them: monkeypatch takes them back
    agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s0")
    agent._sweep_command = sweep["command"]
    args = {name: {"value": value} for name, value in point.items()}
    agent._command_run({"run_id": "r0", "program": None, "args": args})
    return started[0]


def configuration(sdprune, arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of arguments."""
    told = sdprune(*arguments, "--print_config")
    assert told.code == 0, told.err
    return yaml.safe_load(told.out)


def set_value(config: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted option of a printed configuration, which has `init_args` below its classes."""
    if isinstance(value, str) and value.startswith("{"):  # many options in one
        for inner, given in yaml.safe_load(value).items():
            set_value(config, f"{name}.{inner}", str(given) if isinstance(given, dict) else given)
        return
    *path, last = name.split(".")
    for part in path:
        if config[part] is None:
            assert part == "budget"
            config[part] = asdict(sdprune.pruning.Budget(0))
        config = config[part]
        config = config.get("init_args", config)
    assert last in config
    config[last] = printed(value) if last in ("criterion", "allocation") else value


def printed(name: str) -> dict[str, Any]:
    """A class with its defaults, as a printed configuration has it."""
    parameters = list(inspect.signature(getattr(sdprune.pruning, name).__init__).parameters.values())[1:]
    named = [one for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    options = {"init_args": {one.name: one.default for one in named}} if named else {}
    return {"class_path": f"sdprune.pruning.{name}", **options}


def test_there_are_sweeps():
    assert len(SWEEPS) >= 3


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_trial_arrives_and_nothing_else_changes(path, which, sdprune, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep_config(str(path))
    point = grid_point(sweep, which)
    command = agent_command(sweep, point, monkeypatch, tmp_path)
    assert command[0] == "sdprune"
    assert command[-len(point) :] == [f"--{name}={value}" for name, value in point.items()]
    expected = configuration(sdprune, [part for part in command[1:] if part.split("=")[0].strip("-") not in point])
    for name, value in point.items():
        set_value(expected, name, value)
    assert configuration(sdprune, command[1:]) == expected


class StandIn(BaseHTTPRequestHandler):
    """As much of W&B's server as an agent asks for: a sweep, one run to start, then the order to leave."""

    sweep = ""
    run: dict[str, Any] | None = None

    def do_POST(self) -> None:
        body = (
            json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}") if self.path == "/graphql" else {}
        )
        answer = json.dumps({"data": self.answer(body.get("query", ""), body.get("variables") or {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        cls = type(self)
        if "SweepWithRuns" in query:
            node = {"id": "s0", "name": "s0", "state": "RUNNING", "config": cls.sweep, "runs": {"edges": []}}
            return {"project": {"sweep": node}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "a0"}}}
        if "Heartbeat" in query:
            commands: list[dict[str, Any]] = []
            if cls.run is not None:
                commands, cls.run = [cls.run], None
            elif variables["runState"] == "{}":
                commands = [{"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": "a0"}, "commands": json.dumps(commands)}}
        if "UpsertSweep" in query:
            cls.sweep = variables["config"]
            project = {"id": "p0", "name": "p", "entity": {"id": "e0", "name": "e"}}
            return {"upsertSweep": {"sweep": {"name": "s0", "project": project}, "configValidationWarnings": []}}
        return {"viewer": {"id": "u0", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The stand-in's address."""
    serving = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()


def test_a_real_agent_runs_a_trial(server, miniature, tmp_path):
    path = ROOT / "wandb_sweeps" / "mini_sparsity.yaml"
    write_coco(tmp_path / "coco")
    point = {
        **grid_point(load_sweep_config(str(path)), -1),
        "model.output": str(tmp_path / "runs"), "model.store": str(tmp_path / "store"), "model.sampling.steps": 2,
        "data.source": "CocoDirectory", "data.source.root": str(tmp_path / "coco"), "data.calibration": "null",
        "data.n": 4, "data.batch_size": 2,
    }  # fmt: skip
    StandIn.sweep = path.read_text()
    StandIn.run = {
        "type": "run",
        "run_id": "r0",
        "program": "none",
        "args": {k: {"value": v} for k, v in point.items()},
    }
    environment = {
        **os.environ, "WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    agent = [sys.executable, "-m", "wandb", "agent", "e/p/s0"]
    done = subprocess.run(agent, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (pruned,) = (tmp_path / "runs").glob("text_encoder-*")
    prune = json.loads((pruned / "config.json").read_text())["prune"]
    assert {name: spec["sparsity"] for name, spec in prune.items()} == {"text_encoder": 0.7, "unet": 0.5}
    section, name = yaml.safe_load(StandIn.sweep)["metric"]["name"].split("/")
    assert json.loads((pruned / "results.json").read_text())[section][name] != 0
    assert list(tmp_path.rglob("offline-run-*-r0")), "the trial is the agent's own run"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_client_registers_every_sweep(server, tmp_path, path):
    """`wandb sweep FILE`, against the stand-in: what arrives is what the file says."""
    StandIn.sweep = ""
    environment = {
        **os.environ, "WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40, "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "false",  # other tests leave it on
    }  # fmt: skip
    register = [sys.executable, "-m", "wandb", "sweep", "--entity", "e", "--project", "p", str(path)]
    done = subprocess.run(register, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "wandb agent" in done.stderr + done.stdout
    sent, own = yaml.safe_load(StandIn.sweep), yaml.safe_load(path.read_text())
    assert {name: sent[name] for name in own} == own
