"""`sdprune sweep`: the grid of a W&B file, here, cell by cell."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_lines import CONFIGS, predict, runs

from sdprune.study.grid import Grid

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
    found = Grid(ROOT / "wandb_sweeps" / f"{name}.yaml").points
    assert len(found) == len({str(cell) for cell in found}) == count


def test_a_cell_is_the_agents_command_without_wandb(tmp_path):
    grid = Grid(write(tmp_path / "grid.yaml"))
    assert grid.command(grid.points[3]) == [
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
    first = [re.sub(r", \d+ s$", "", line) for line in told.out.splitlines() if line.startswith("[")]
    assert cut == [line.replace(": fid", ": finished already, fid") for line in first]
    assert re.match(r"\[4/4\] unet\.criterion=Wanda unet\.sparsity=0\.6: fid [\d.]+ \([+-]", first[3])
    assert told.out.startswith("In all cells: text_encoder.sparsity=0.0 data.n=7 data.batch_size=2")
    shutil.rmtree(next((tmp_path / "out").glob("unet-wanda-*-0.6-*")))
    dry = sdprune("sweep", path, "--dry-run", *options).out.splitlines()
    assert [line.endswith("  # finished already") for line in dry] == [True, True, True, False]
    assert [shlex.split(line, comments=True)[1:] for line in dry] == [
        [*Grid(path).command(point), *options] for point in Grid(path).points
    ]


def test_several_cells_at_once_give_the_same_records(sdprune, miniature, tmp_path):
    """Two jobs that start at the same moment share the dense record and the statistics; a bad cell fails alone."""
    parameters = GRID["parameters"] | {"model.prune.unet.include": {"values": ["[no_such_layer]", "['*']"]}}
    parameters |= {"model.prune.unet.sparsity": {"values": [0.6]}}
    path = write(tmp_path / "grid.yaml", parameters=parameters)
    told = {jobs: sdprune("sweep", path, f"--jobs={jobs}", *quick(tmp_path / jobs)) for jobs in ("1", "2")}
    lines = {
        jobs: [re.sub(r", \d+ s$", "", line) for line in one.out.splitlines() if line.startswith("[")]
        for jobs, one in told.items()
    }
    assert [line.replace(str(tmp_path / "2"), str(tmp_path / "1")) for line in lines["2"]] == lines["1"]
    assert "2 of 4 cells done, 2 failed" in told["2"].out
    for run in runs(tmp_path / "1", ""):
        other = tmp_path / "2" / run.name
        for file in run.rglob("*.png"):
            assert file.read_bytes() == (other / file.relative_to(run)).read_bytes()
    assert len(runs(tmp_path / "2", "")) == 3


def test_the_flags_take_a_space_too(sdprune, tmp_path):
    path = write(tmp_path / "grid.yaml")
    options = quick(tmp_path / "out")
    spaced = [word for option in options for word in option.split("=", 1)]
    told = sdprune("sweep", "--jobs", "1", "--dry-run", *spaced, path)
    assert (told.code, told.err) == (0, "")
    assert told.out == sdprune("sweep", path, "--dry-run", *options).out


@pytest.mark.parametrize(
    ("word", "hint"),
    [("--job=1", "'--job'. Did you mean '--jobs'?"), ("--dry_run", "'--dry_run'. Did you mean '--dry-run'?"),
     ("--wandbb=offline", "'--wandbb'. Did you mean '--wandb'?")],
)  # fmt: skip
def test_a_misspelt_flag_is_the_sweeps_own(sdprune, tmp_path, word, hint):
    told = sdprune("sweep", write(tmp_path / "grid.yaml"), word)
    assert told.code == 2
    assert told.err.startswith(f"sdprune: error: Unknown option of sdprune sweep {hint} Choices: --jobs, --dry-run, ")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("name", ["config", "seed_everything", "trainer", "model", "data", "wandb_group"])
def test_options_of_the_cells_without_a_dot_are_no_flags(sdprune, tmp_path, name):
    """They are for the cells to judge, and each verb has them: none is called unknown."""
    told = sdprune("sweep", write(tmp_path / "grid.yaml"), "--dry-run", f"--{name}={tmp_path}/none")
    assert "Unknown option" not in told.err


@pytest.mark.parametrize("jobs", ["0", "two", "-1", ""])
def test_a_wrong_number_of_jobs_is_told(sdprune, tmp_path, jobs):
    told = sdprune("sweep", write(tmp_path / "grid.yaml"), f"--jobs={jobs}")
    assert told.code == 2
    assert f"--jobs: {jobs!r} is no number of 1 or more, as in 2" in told.err


SMALL = {"model.prune.text_encoder.sparsity": {"value": 0}}


def test_a_cell_that_fails_does_not_stop_the_others(sdprune, tmp_path):
    path = write(tmp_path / "grid.yaml", parameters=SMALL | {"data.n": {"values": [700, 7]}})
    told = sdprune("sweep", path, *(word for word in quick(tmp_path / "out") if "data.n=" not in word))
    assert told.code == 1
    assert re.search(r"^\[1/2\] data\.n=700: failed: ", told.out, re.MULTILINE)
    assert "1 of 2 cells done, 1 failed: run the same command again" in told.out


def test_the_same_fault_in_every_cell_stops_the_sweep(sdprune, tmp_path):
    path = write(
        tmp_path / "grid.yaml", parameters=SMALL | {"model.prune.unet.sparsity": {"values": [0.1, 0.2, 0.3, 0.4]}}
    )
    told = sdprune("sweep", path, *quick(tmp_path / "out"), "--data.n=700")
    assert told.code == 1
    assert told.out.count(": failed: ") == 3
    assert "Stopped: the first 3 cells failed alike." in told.out


FAULTS = {
    "model.prune.unet.sparsity": ([0.2, 1.5], "sparsity is 1.5: give a share between 0 and 1"),
    "model.prune.unet.sparsty": ([0.2, 0.3], "Unknown option 'model.prune.unet.sparsty' of PruneSpec. Did you mean"),
    "model.prune.unet.criterion": (["Wanda", "Wandaa"], "Did you mean 'Wanda'?"),
    "model.prune.unett.sparsity": ([0.2, 0.3], "Unknown component 'unett'. Did you mean 'unet'?"),
    "data.n": (["many", "7"], "data"),
}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_faults_are_found_before_the_first_cell_runs(sdprune, tmp_path, jobs):
    """One line for each kind of fault, with the file, the first cell that has it, and how many more."""
    files = []
    for number, (name, (values, _)) in enumerate(FAULTS.items()):
        parameters = SMALL | {name: {"values": values}, "model.seed": {"values": [0, 1, 2]}}
        files.append(write(tmp_path / f"{number}.yaml", parameters=parameters))
    told = sdprune("sweep", *files, f"--jobs={jobs}", *quick(tmp_path / "out"))
    assert (told.code, told.out) == (2, "")
    lines = told.err.splitlines()
    assert len(lines) == len(FAULTS)
    for line, file, (name, (values, words)) in zip(lines, files, FAULTS.items(), strict=True):
        bad = [
            value
            for value in values
            if name.endswith(("sparsty", "unett.sparsity")) or value in (1.5, "Wandaa", "many")
        ]
        first = 3 * values.index(bad[0]) + 1
        assert line.startswith(f"sdprune: error: {file}, cell {first} (")
        assert f"{name.removeprefix('model.prune.')}={bad[0]}" in line
        assert "model.seed=0" in line
        assert "text_encoder.sparsity" not in line  # the same in all cells
        assert f") and {3 * len(bad) - 1} more: " in line
        assert words in line
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_commands_and_checks_them(sdprune, tmp_path):
    path = write(tmp_path / "grid.yaml")
    options = quick(tmp_path / "out")
    told = sdprune("sweep", path, "--dry-run", *options)
    assert (told.code, told.err) == (0, "")
    expected = [["sdprune", *Grid(path).command(point), *options] for point in Grid(path).points]
    assert [shlex.split(line) for line in told.out.splitlines()] == expected
    assert not (tmp_path / "out").exists()
    told = sdprune("sweep", path, "--dry-run", *options, "--model.sede=1")
    assert (told.code, told.out) == (2, "")
    assert "Did you mean 'model.seed'" in told.err


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ({"name": "comparison/fid_dif"}, "Unknown metric 'comparison/fid_dif'. Did you mean 'comparison/fid_diff'?"),
        ({"name": "metrics/clip"}, "Choices: metrics/fid, comparison/fid_diff, metrics/clip_score, metrics/clip_gap"),
        ({"name": "fid"}, "Unknown metric 'fid'"),
        ({"name": "metrics/fid", "goal": "maximise"}, "Did you mean 'maximize'?"),
        ("metrics/fid", "give {name: comparison/fid_diff, goal: minimize}"),
    ],
)
def test_a_wrong_metric_is_told_before_the_first_cell(sdprune, tmp_path, metric, words):
    path = write(tmp_path / "grid.yaml", metric=metric)
    told = sdprune("sweep", path, *quick(tmp_path / "out"))
    assert (told.code, told.out) == (2, "")
    assert words in told.err
    assert str(path) in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_number_that_is_recorded_can_be_the_metric(sdprune, tmp_path):
    """Those of all metrics, by the record itself; the ends of intervals too."""
    parameters = SMALL | {"model.prune.unet.sparsity": {"value": 0.5}}
    config = ["--config", str(CONFIGS / "metrics.yaml"), *quick(tmp_path / "out")]
    assert sdprune("sweep", write(tmp_path / "grid.yaml", parameters=parameters), *config).code == 0
    (results,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("unet-*/results.json"))
    names = [f"{part}/{name}" for part in ("metrics", "comparison") for name in results[part] if name != "dense"]
    names = [name for name in names if not name.endswith(("_high", "_se"))]  # _low stands for them
    assert len(names) > 15
    for number, name in enumerate(names):
        write(tmp_path / f"{number}.yaml", parameters=parameters, metric={"name": name})
    told = sdprune("sweep", *(tmp_path / f"{number}.yaml" for number in range(len(names))), "--dry-run", *config)
    assert (told.code, told.err) == (0, "")


@pytest.mark.parametrize(("goal", "reverse"), [("minimize", False), ("maximize", True)])
def test_a_table_shows_the_cells_by_score(sdprune, tmp_path, goal, reverse):
    values = {"model.prune.unet.sparsity": {"values": [0.2, 0.9, 0.5]}}
    path = write(
        tmp_path / "grid.yaml", parameters=SMALL | values, metric={"name": "comparison/fid_diff", "goal": goal}
    )
    told = sdprune("sweep", path, *quick(tmp_path / "out"))
    assert told.code == 0
    assert "[2/3] unet.sparsity=0.9: " in told.out
    lines = told.out.splitlines()
    start = lines.index("grid.yaml, by comparison/fid_diff, the best first")
    head, *rows = [line.split() for line in lines[start + 1 : start + 5]]
    assert head[:2] == ["fid_diff", "fid"]
    results = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("unet-*/results.json")]
    found = sorted((r["comparison"]["fid_diff"], r["metrics"]["fid"]) for r in results)
    expected = [[f"{number:.4f}" for number in pair] for pair in (found[::-1] if reverse else found)]
    assert [row[:2] for row in rows] == expected


def workers_of(sweep: "subprocess.Popen[str]") -> list[int]:
    """The processes that run cells of a sweep."""
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    return [int(one) for one in children if b"runner import work" in Path(f"/proc/{one}/cmdline").read_bytes()]


def when_it_draws(sweep: "subprocess.Popen[str]", output: Path, count: int = 1) -> None:
    """Wait until cells of a sweep have begun to draw."""
    limit = time.monotonic() + 200
    while len(list(output.glob("*/config.json"))) < count:
        assert sweep.poll() is None, sweep.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.2)


def begin(path: Path, *options: str) -> "subprocess.Popen[str]":
    """Start a sweep of two jobs in a process group of its own."""
    words = [Path(sys.executable).parent / "sdprune", "sweep", path, "--jobs=2", *options]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def test_a_worker_that_dies_fails_one_cell_only(miniature, tmp_path):
    """Its successor takes the next cell."""
    parameters = SMALL | {"model.prune.unet.sparsity": {"values": [0.2, 0.4, 0.6]}}
    parameters |= {"model.sampling.steps": {"value": 20}}
    path = write(tmp_path / "grid.yaml", parameters=parameters)
    sweep = begin(path, *(word for word in quick(tmp_path / "out") if "sampling.steps" not in word))
    when_it_draws(sweep, tmp_path / "out")
    os.kill(workers_of(sweep)[0], signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert (sweep.returncode, err) == (1, "")
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert len(lines) == 3
    assert sum("failed: its process died (exit code -9)" in line for line in lines) == 1
    assert "2 of 3 cells done, 1 failed" in out


def test_a_sweep_that_is_killed_takes_its_workers_with_it(miniature, tmp_path):
    sweep = begin(write(tmp_path / "grid.yaml"), *quick(tmp_path / "out"), "--model.sampling.steps=500")
    when_it_draws(sweep, tmp_path / "out")
    workers = workers_of(sweep)
    assert len(workers) == 2
    sweep.kill()
    sweep.communicate()
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{one}/cmdline").exists() and Path(f"/proc/{one}/cmdline").read_bytes() for one in workers):
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_an_interrupted_sweep_leaves_no_process(miniature, tmp_path):
    sweep = begin(write(tmp_path / "grid.yaml"), *quick(tmp_path / "out"), "--model.sampling.steps=500")
    when_it_draws(sweep, tmp_path / "out")
    os.killpg(sweep.pid, signal.SIGINT)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    assert err == "sdprune: interrupted; run the same command again to go on\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(sweep.pid, 0)


def test_a_sweep_of_the_dense_model_alone_can_name_a_difference(sdprune, tmp_path):
    """As the first cell of a sweep does: it is compared with nothing, so that its `metric:` cannot be judged."""
    parameters = SMALL | {"model.prune.unet.sparsity": {"value": 0.0}}
    path = write(tmp_path / "grid.yaml", parameters=parameters, metric={"name": "comparison/fid_diff"})
    told = sdprune("sweep", path, *quick(tmp_path / "out"))
    assert (told.code, told.err) == (0, "")
    assert "1 of 1 cells done" in told.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "bayes"}, "only `grid` has cells"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "parameter a has neither"),
        ({"parameters": {"a": {"values": []}}}, "parameter a has values []: give a list"),
        ({"parameters": {"a": {"values": 3}}}, "parameter a has values 3: give a list"),
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
    assert "Unknown sweep" in told.err
