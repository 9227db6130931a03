"""What a run shows while it goes on: calibration, drawing, waiting."""

import json
import os
import pty
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from command_lines import fit, predict


def passes_in(store: Path) -> int:
    """The store keeps a file for each pass; statistics of one component are gathered together, those of its pruning
    in order by themselves."""
    most: dict[object, int] = {}
    for file in store.glob("*/facts.json"):
        facts = json.loads(file.read_text())
        group = (facts["component"], "prune" in facts)
        most[group] = max(most.get(group, 0), len(facts["files"]))
    return sum(most.values())


def counts(out: str, unit: str = "images") -> list[tuple[int, int]]:
    return [(int(done), int(total)) for done, total in re.findall(rf"(\d+) of (\d+) {unit}", out)]


CALIBRATIONS = {
    "fit of statistics": lambda out: fit("calibrate", out, "--model.calibration.hessian_gib=0.005"),
    "fit of a pruned model": lambda out: fit("prune", out, "--model.prune.unet.criterion=Wanda"),
    "predict": lambda out: predict(out, "--model.prune.unet.criterion=Wanda", "--model.compare_dense=false"),
    "in order": lambda out: fit(
        "prune", out, "--model.prune.text_encoder={sparsity: 0.4, criterion: Wanda, allocation: OWL, order: sequential}"
    ),
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_calibration_says_what_it_gathers_and_how_far_it_is(sdprune, tmp_path, case):
    told = sdprune(*CALIBRATIONS[case](tmp_path))
    assert told.code == 0, told.err
    lines = [line for line in told.out.splitlines() if line.startswith("calibration of ")]
    passes = passes_in(tmp_path / "statistics")
    assert passes > 1 or case in ("fit of a pruned model", "predict")
    assert lines[0].endswith(": 5 images")
    assert re.match(r"calibration of (text_encoder|unet) \((hessian, )?input_norm\)", lines[0])
    if passes > 1:
        assert f"pass 1 of {passes}" in lines[0]
    seen = counts("\n".join(lines))
    assert seen == sorted(seen)
    assert seen[-1] == (5 * passes, 5 * passes)
    assert len(lines) <= 7
    assert re.search(r" s, about \d+ s left$", lines[1])
    again = sdprune(*CALIBRATIONS[case](tmp_path))
    assert "calibration of" not in again.out


def test_in_a_terminal_calibration_has_a_bar(miniature, tmp_path):
    ours, theirs = pty.openpty()
    command = [Path(sys.executable).parent / "sdprune", *fit("calibrate", tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    started = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""
    try:
        while part := os.read(ours, 65536):
            screen += part
    except OSError:  # the other end is closed
        pass
    assert started.wait(60) == 0, screen[-2000:]
    text = screen.decode()
    assert "calibration of text_encoder (hessian, input_norm), pass 1 of 2" in text
    assert "calibration of unet (hessian, input_norm), pass 2 of 2" in text
    assert "10/10" in text
    assert "━" in text
    assert "?25h" in text.rpartition("?25l")[2], "the cursor is shown again"


def test_a_run_of_several_machines_says_what_it_waits_for(miniature, tmp_path):
    command = [Path(sys.executable).parent / "sdprune", *predict(tmp_path, "--trainer.num_nodes=2")]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = started.stdout.readline()
    assert "2 processes on 2 machines" in line
    assert "127.0.0.1:29613" in line
    assert "NODE_RANK=1" in line
    other = subprocess.run(command, capture_output=True, text=True, env={**environment, "NODE_RANK": "1"}, timeout=300)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, other.returncode) == (0, 0), err + other.stderr
    assert "7 of 7 images" in out


def test_a_finished_run_says_since_when(sdprune, tmp_path):
    before = datetime.now().astimezone().replace(microsecond=0)
    first = sdprune(*predict(tmp_path))
    after = datetime.now().astimezone()
    assert "finished already" not in first.out
    for _ in range(2):
        told = sdprune(*predict(tmp_path))
        assert told.code == 0, told.err
        (line,) = [line for line in told.out.splitlines() if "finished already" in line]
        when = datetime.fromisoformat(re.search(r"already, (.*): nothing is drawn again", line)[1])
        assert before <= when <= after
        assert "images," not in told.out
