"""What W&B receives: read back from the run file that `--wandb=offline` writes, and held against the record."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from coco_files import write_coco
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


def logged(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The history and the configuration of a run directory, by name."""
    history, config = {}, {}
    for record in run_records(next(run.glob("*.wandb"))):
        for item in record.history.item:
            history[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
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


@pytest.fixture
def trial(sdprune, tmp_path):
    """Runs one trial on the untrained miniature, offline, and returns its W&B run directory and all runs' directory."""
    write_coco(tmp_path / "coco")
    output = tmp_path / "runs"

    def run() -> tuple[Path, Path]:
        before = set(output.glob("wandb/offline-run-*"))
        options = {
            "config": MINI, "model.output": output, "model.store": tmp_path / "store", "model.sampling.steps": 2,
            "data.source": "CocoDirectory", "data.source.root": tmp_path / "coco", "data.calibration": "null",
            "data.n": 4, "data.batch_size": 2, "wandb": "offline",
        }  # fmt: skip
        told = sdprune("predict", *(f"--{key}={value}" for key, value in options.items()))
        assert told.code == 0, told.err
        wandb.finish()
        wandb.teardown()  # the run file is whole only once its writer has ended
        (new,) = set(output.glob("wandb/offline-run-*")) - before
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
