"""What W&B receives: read back from the run file that `--wandb=offline` writes, and held against the record."""

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from coco_files import write_coco
from command_lines import fit, predict
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

MINI = Path(__file__).parent.parent / "configs" / "mini" / "predict.yaml"
BLOCK = 32768


def run_records(path: Path) -> Iterator[Record]:
    """The records of a run file, which is a LevelDB log behind seven bytes."""
    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def run_of(directory: Path) -> Any:
    """The run itself: its id, names, project."""
    return next(record.run for record in run_records(next(directory.glob("*.wandb"))) if record.HasField("run"))


def summary_of(directory: Path) -> dict[str, Any]:
    """What the table of runs shows."""
    records = run_records(next(directory.glob("*.wandb")))
    items = [item for record in records for item in record.summary.update]
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def rows_of(directory: Path, name: str) -> list[dict[str, Any]]:
    """The rows of the history that have a column."""
    rows = []
    for record in run_records(next(directory.glob("*.wandb"))):
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        rows += [row] if name in row else []
    return rows


def logged(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The history and the configuration of a run directory, by name."""
    history, config = {}, {}
    for record in run_records(next(run.glob("*.wandb"))):
        for item in record.history.item:
            history[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.config.update:
            config[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return history, config


def numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """All numbers of nested results, under names with slashes."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(numbers(value, f"{prefix}{key}/"))
        elif not isinstance(value, str):
            found[f"{prefix}{key}"] = value
    return found


def expected(directory: Path, prefix: str = "") -> dict[str, float]:
    results = json.loads((directory / "results.json").read_text())
    sections = [numbers(results[name], f"{prefix}{name}/") for name in ("metrics", "comparison", "sparsity", "speed")]
    return {key: value for section in sections for key, value in section.items()}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """The first run of a process decides where W&B keeps copies of what it sends."""
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.delenv("WANDB_DATA_DIR")


def trial_options(tmp_path: Path, **more: Any) -> list[str]:
    """A trial on the untrained miniature, offline."""
    options = {
        "config": MINI, "model.output": tmp_path / "runs", "model.store": tmp_path / "store", "model.sampling.steps": 2,
        "data.source": "CocoDirectory", "data.source.root": tmp_path / "coco", "data.calibration": "null",
        "data.n": 4, "data.batch_size": 2, "wandb": "offline",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in {**options, **more}.items()]


@pytest.fixture
def trial(sdprune, tmp_path):
    """Runs one trial and returns its W&B run directory and all runs' directory."""
    write_coco(tmp_path / "coco")
    output = tmp_path / "runs"

    def run(**more: Any) -> tuple[Path, Path]:
        before = set(output.glob("wandb/offline-run-*"))
        told = sdprune("predict", *trial_options(tmp_path, **more))
        assert told.code == 0, told.err
        assert wandb.run is None, "the run was finished"
        wandb.teardown()  # the run file is whole only once its writer has ended
        (new,) = set(output.glob("wandb/offline-run-*")) - before
        assert told.out.splitlines()[-1] == f"W&B        wandb sync {new.resolve()}"
        return new, output

    return run


def test_one_run_holds_the_pruned_and_the_dense_record(trial):
    run, output = trial()
    history, config = logged(run)
    (dense,), (pruned,) = output.glob("dense-*"), output.glob("text_encoder-*")
    wanted = expected(pruned) | expected(dense, "dense/")
    assert {"metrics/fid", "comparison/fid_diff", "sparsity/nominal", "dense/metrics/clip_score"} <= wanted.keys()
    assert {key: history.get(key) for key in wanted} == pytest.approx(wanted)
    assert config["record"] == json.loads((pruned / "config.json").read_text())
    assert (config["directory"], config["dense_directory"]) == (pruned.name, dense.name)
    (file,) = history["samples.filenames"]
    assert file.startswith("media/images/")
    with Image.open(run / "files" / file) as image, Image.open(pruned / "grid.png") as grid:
        assert np.array_equal(np.asarray(image), np.asarray(grid))

    again, _ = trial()  # everything is there: nothing is drawn, and the new run is told all the same
    history, _ = logged(again)
    assert {key: history.get(key) for key in wanted} == pytest.approx(wanted)
    assert history["samples.filenames"]


def table_of(run: Path, name: str) -> tuple[list[str], list[list[Any]], dict[str, Path]]:
    """Columns and rows of a table that was logged, and where the files lie that are sent with it."""
    for record in run_records(next(run.glob("*.wandb"))):
        files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
        if f"{name}.table.json" in files:
            table = json.loads(files[f"{name}.table.json"].read_text())
            return table["columns"], table["data"], files
    raise AssertionError(f"{name} was not logged")


def images_of(record: Path) -> dict[str, dict[str, str]]:
    """The rows of a record's images.csv, by file."""
    with (record / "images.csv").open() as file:
        return {row["file_name"]: row for row in csv.DictReader(file)}


def test_the_prompts_that_lost_most_arrive_with_both_pictures(trial, monkeypatch):
    monkeypatch.setattr("sdprune.runs.tracking.PROMPTS", 3)  # of four
    run, output = trial()
    (dense,), (pruned,) = output.glob("dense-*"), output.glob("text_encoder-*")
    before, after = images_of(dense), images_of(pruned)
    lost = {name: float(before[name]["clip_score"]) - float(row["clip_score"]) for name, row in after.items()}
    columns, rows, files = table_of(run, "prompts")
    assert columns[:6] == ["prompt", "dense", "pruned", "clip_score", "clip_score of dense", "clip_score lost"]
    assert [name for name in columns if name.startswith("dense_")] == ["dense_mse", "dense_ssim"]  # are losses already
    assert len(rows) == 3
    for name, row in zip(sorted(lost, key=lambda name: -lost[name]), rows, strict=False):
        scores = dict(zip(columns[3:], row[3:], strict=True))
        assert row[0] == after[name]["caption"]
        assert {key: scores[key] for key in after[name] if key in scores} == {
            key: pytest.approx(float(value)) for key, value in after[name].items() if key in scores
        }
        assert scores["clip_score of dense"] == pytest.approx(float(before[name]["clip_score"]))
        assert scores["clip_score lost"] == pytest.approx(lost[name], abs=1e-6)
        for shown, record in zip(row[1:3], (dense, pruned), strict=True):
            drawn = record / "images" / f"{Path(name).stem}.png"
            assert files[shown["path"]].read_bytes() == drawn.read_bytes()
    assert len(files) == 1 + 2 * 3  # the table and no other picture
    assert all(path.is_relative_to(output) for path in files.values())  # nothing grows in the home directory


def test_runs_of_a_page_share_a_chart_of_each_score_against_sparsity(trial):
    """W&B joins tables with one key, so each run gives its own point and that of the dense model."""
    for options in ({}, {"model.prune.text_encoder.sparsity": 0.2}):
        run, output = trial(**options)
        _, config = logged(run)
        pruned = output / config["directory"]
        dense = output / config["dense_directory"]
        results = {path.name: json.loads((path / "results.json").read_text()) for path in (dense, pruned)}
        scores = {name for name in results[pruned.name]["metrics"] if not name.endswith("_se")}
        assert {"fid", "clip_score"} <= scores
        charts = {key.rpartition(".")[2]: chart for key, chart in config.items() if key.startswith("_wandb.visualize.")}
        assert set(charts) == {f"curves/{name}" for name in scores}
        for name in scores:
            chart = charts[f"curves/{name}"]["panel_config"]
            assert chart["panelDefId"] == "wandb/scatter/v0"
            assert chart["fieldSettings"] == {"x": "zeros", "y": name}
            columns, rows, _ = table_of(run, f"curves/{name}_table")
            assert columns == ["zeros", "nominal sparsity", name, "run"]
            assert rows == [
                [one["sparsity"]["prunable"]["zero_fraction"], one["sparsity"]["nominal"], one["metrics"][name], run]
                for run, one in results.items()
            ]


def test_a_dense_run_has_one_picture_of_each_prompt_and_one_point_of_each_chart(trial):
    run, output = trial(**{"model.prune": "{}"})
    (dense,) = output.glob("dense-*")
    results = json.loads((dense / "results.json").read_text())
    columns, rows, files = table_of(run, "prompts")
    assert columns[:3] == ["prompt", "picture", "clip_score"]
    assert not any("dense" in name for name in columns if not name.startswith("dense_"))
    by_caption = {row["caption"]: (name, float(row["clip_score"])) for name, row in images_of(dense).items()}
    assert len(rows) == len(by_caption) == 4
    for row in rows:
        name, score = by_caption[row[0]]
        assert row[2] == pytest.approx(score)
        assert files[row[1]["path"]].read_bytes() == (dense / "images" / f"{Path(name).stem}.png").read_bytes()
    zeros = results["sparsity"]["prunable"]["zero_fraction"]  # those that an untrained model has
    assert table_of(run, "curves/fid_table")[1] == [[zeros, 0, results["metrics"]["fid"], dense.name]]


def test_captions_that_are_lost_are_named_in_a_line(trial, sdprune, tmp_path):
    _, output = trial()
    (pruned,) = output.glob("text_encoder-*")
    (pruned / "images.csv").unlink()
    told = sdprune("predict", *trial_options(tmp_path))
    wandb.teardown()
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert f"{pruned / 'images.csv'} is missing or damaged: delete results.json beside it and run again" in told.err


def test_a_record_is_one_run_however_often_it_is_logged(trial, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "my-project")
    monkeypatch.setenv("WANDB_ENTITY", "my-team")
    directory, output = trial()
    (dense,), (pruned,) = output.glob("dense-*"), output.glob("text_encoder-*")
    run = run_of(directory)
    label, _, fingerprint = pruned.name.rpartition("-")
    assert (run.run_id, run.display_name, run.run_group) == (fingerprint, label, dense.name)
    assert (run.project, run.entity) == ("my-project", "my-team")
    again, _ = trial()
    assert run_of(again).run_id == fingerprint

    other, _ = trial(wandb_project="other", wandb_group="mine")
    assert (run_of(other).project, run_of(other).run_group) == ("other", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    trials, _ = trial()
    assert (run_of(trials).run_id, run_of(trials).run_group) == ("of-the-agent", "sweep1")


def test_progress_verdicts_and_the_model_arrive(trial):
    directory, output = trial()
    for prefix in ("dense/progress", "progress"):
        rows = rows_of(directory, f"{prefix}/images")
        assert [row[f"{prefix}/images"] for row in rows] == [2, 4]
        assert 0 < rows[0][f"{prefix}/seconds"] < rows[1][f"{prefix}/seconds"]
    (pruned,) = output.glob("text_encoder-*")
    verdicts = json.loads((pruned / "results.json").read_text())["verdicts"]
    summary = summary_of(directory)
    assert verdicts
    assert {name: summary[f"verdicts/{name}"] for name in verdicts} == {
        name: one["verdict"] for name, one in verdicts.items()
    }
    assert logged(directory)[1]["model"] == "miniature"


@pytest.mark.parametrize("verb", ["predict", "fit"])
def test_without_login_one_line_says_so_before_anything_is_drawn(miniature, tmp_path, verb):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    arguments = predict(tmp_path / "runs") if verb == "predict" else fit("prune", tmp_path / "runs")
    command = [Path(sys.executable).parent / "sdprune", *arguments, "--wandb=online"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("sdprune: error: W&B cannot be used: No API key")
    assert "--wandb=offline" in done.stderr
    assert not list((tmp_path / "runs").rglob("*.png"))
    assert not list((tmp_path / "runs").glob("*-*"))


def test_the_cells_of_a_sweep_are_runs_of_one_group(sdprune, tmp_path, monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    sweep = {
        "name": "two_cells", "method": "grid", "parameters": {"model.prune.unet.sparsity": {"values": [0.1, 0.2]}},
        "command": ["sdprune", "predict", f"--config={MINI}", "--wandb=online", "${args}"],
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    options = [word for word in predict(tmp_path / "runs", "--wandb=offline") if word.startswith("--") and "=" in word]
    told = sdprune("sweep", tmp_path / "sweep.yaml", *options)
    assert told.code == 0, told.out + told.err
    wandb.teardown()
    paths = list((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    (line,) = (line for line in told.out.splitlines() if "wandb sync" in line)
    assert line.startswith("W&B        wandb sync ")
    assert set(line.split()[3:]) == {str(path.resolve()) for path in paths}
    runs = [run_of(path) for path in paths]
    assert len({run.run_id for run in runs}) == 2
    assert {run.run_group for run in runs} == {"two_cells"}


def test_a_pruned_model_is_a_run_too(sdprune, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    told = sdprune(*fit("prune", tmp_path, "--wandb=offline"))
    assert told.code == 0, told.err
    wandb.teardown()
    (directory,) = tmp_path.glob("wandb/offline-run-*")
    (saved,) = tmp_path.glob("pruned-*")
    assert saved.name == f"{run_of(directory).display_name}-{run_of(directory).run_id}"
    report = json.loads((saved / "pruning_report.json").read_text())
    assert logged(directory)[0]["sparsity/nominal"] == pytest.approx(report["sparsity"]["nominal"])
