"""`sdprune sweep`: the grid of a W&B file, here, cell by cell."""

import re
from pathlib import Path

import pytest
import yaml
from command_lines import CONFIGS, predict, runs

from sdprune.study.sweep import cells, command

ROOT = Path(__file__).parent.parent
GRID = {
    "method": "grid",
    "parameters": {
        "model.prune.text_encoder.sparsity": {"value": 0.0},
        "model.prune.unet.criterion": {"values": ["Magnitude", "Wanda"]},
        "model.prune.unet.sparsity": {"values": [0.2, 0.6]},
    },
    "command": ["sdprune", "predict", f"--config={CONFIGS}/predict.yaml", "--wandb=online", "${args}"],
}


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(GRID | changes))
    return path


def quick(output: Path) -> list[str]:
    """The options of a small run."""
    return predict(output)[3:]


@pytest.mark.parametrize(
    ("name", "count"),
    [("mini_methods_unet", 54), ("mini_methods_text_encoder", 54), ("mini_granularity_unet", 36), ("sd2_sparsity", 25)],
)
def test_shipped_grids_have_their_cells(name, count):
    found = cells(ROOT / "wandb_sweeps" / f"{name}.yaml")
    assert len(found) == len({str(cell) for cell in found}) == count


def test_a_cell_is_the_agents_command_without_wandb(tmp_path):
    path = write(tmp_path / "grid.yaml")
    assert command(path, cells(path)[3]) == [
        "predict", f"--config={CONFIGS}/predict.yaml", "--model.prune.text_encoder.sparsity=0.0",
        "--model.prune.unet.criterion=Wanda", "--model.prune.unet.sparsity=0.6",
    ]  # fmt: skip


def test_every_cell_runs_once_and_calibrates_once(sdprune, tmp_path):
    path = write(tmp_path / "grid.yaml")
    options = quick(tmp_path / "out")
    told = sdprune("sweep", path, *options)
    assert told.code == 0, told.err
    assert "4 of 4 cells done" in told.out
    assert len(runs(tmp_path / "out", "")) == 5  # and the dense model
    assert len(list((tmp_path / "out" / "statistics").glob("*/facts.json"))) == 1
    pictures = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")}
    again = sdprune("sweep", path, *options)
    assert again.code == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")} == pictures
    cut = [re.sub(r", \d+ s$", "", line) for line in again.out.splitlines() if line.startswith("[")]
    assert cut == [re.sub(r", \d+ s$", "", line) for line in told.out.splitlines() if line.startswith("[")]
    assert re.search(r"^\[4/4\] .*unet\.sparsity=0\.6: fid [\d.]+ \([+-]", again.out, re.MULTILINE)


def test_several_cells_at_once_give_the_same_records(sdprune, miniature, tmp_path):
    """Two jobs that start at the same moment share the dense record and the statistics; a bad cell fails alone."""
    parameters = GRID["parameters"] | {"model.prune.unet.sparsity": {"values": [0.2, 0.6, 1.5]}}
    path = write(tmp_path / "grid.yaml", parameters=parameters)
    told = {jobs: sdprune("sweep", path, f"--jobs={jobs}", *quick(tmp_path / jobs)) for jobs in ("1", "2")}
    lines = {
        jobs: [re.sub(r", \d+ s$", "", line) for line in one.out.splitlines() if line.startswith("[")]
        for jobs, one in told.items()
    }
    assert lines["2"] == [line.replace("failed: ", "failed: error: ") for line in lines["1"]]
    assert "4 of 6 cells done, 2 failed" in told["2"].out
    for run in runs(tmp_path / "1", ""):
        other = tmp_path / "2" / run.name
        for file in run.rglob("*.png"):
            assert file.read_bytes() == (other / file.relative_to(run)).read_bytes()
    assert len(runs(tmp_path / "2", "")) == 5


@pytest.mark.parametrize("jobs", ["0", "two", "-1", ""])
def test_a_wrong_number_of_jobs_is_told(sdprune, tmp_path, jobs):
    told = sdprune("sweep", write(tmp_path / "grid.yaml"), f"--jobs={jobs}")
    assert told.code == 2
    assert f"--jobs is {jobs!r}: give a number of 1 or more" in told.err


def test_a_cell_that_fails_does_not_stop_the_others(sdprune, tmp_path):
    parameters = {
        "model.prune.unet.sparsity": {"values": [1.5, 0.5]},
        "model.prune.text_encoder.sparsity": {"value": 0},
    }
    path = write(tmp_path / "grid.yaml", parameters=parameters)
    told = sdprune("sweep", path, *quick(tmp_path / "out"))
    assert told.code == 1
    assert re.search(r"^\[1/2\] .*sparsity=1\.5.*: failed: sparsity is 1\.5", told.out, re.MULTILINE)
    assert "1 of 2 cells done, 1 failed: run the same command again" in told.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "bayes"}, "only `grid` has cells"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "parameter a has neither"),
        ({"parameters": None}, "is no sweep"),
        ({"command": ["python", "${args}"]}, "must contain sdprune"),
    ],
)
def test_a_file_that_is_no_grid_is_told(sdprune, tmp_path, changes, words):
    told = sdprune("sweep", write(tmp_path / "grid.yaml", **changes))
    assert told.code == 2
    assert words in told.err
    assert told.err.count("\n") == 1


def test_help_and_a_missing_file(sdprune, tmp_path):
    assert "Run every cell" in sdprune("sweep", "--help").out
    assert sdprune("sweep").code == 0
    told = sdprune("sweep", tmp_path / "none.yaml")
    assert told.code == 2
    assert "Cannot read the sweep" in told.err


def test_the_readmes_python_runs(capsys):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (text,) = (snippet for snippet in snippets if "inputs=" in snippet)
    exec(text, {})
    assert capsys.readouterr().out == "16384 of 32768\n"
