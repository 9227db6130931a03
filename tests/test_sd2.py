"""The configurations for Stable Diffusion 2, run: `predict` on the full-size architecture, `fit` on the miniature.

The weights are random, the metrics a tiny CLIP: all else is the study's own, so the audit's counts come out exactly.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from coco_files import write_coco
from full_size import save_full_size
from safetensors.torch import load_file
from tiny_clip import save_tiny_clip

CONFIGS = Path(__file__).parent.parent / "configs" / "sd2"
TEXT_ENCODER, UNET, VAE = 340_387_840, 865_910_724, 83_653_863
TEXT_WEIGHTS, UNET_WEIGHTS = 289_406_976, 301_219_840


def predict(*options: object) -> None:
    """Run the study's job in a process of its own, which gives its memory back; one thread a process."""
    command = [sys.executable, "-m", "sdprune", "predict", "--config", CONFIGS / "predict.yaml", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with COCO's layout, a tiny CLIP, and the full-size model while the tests run."""
    root = tmp_path_factory.mktemp("sd2")
    write_coco(root / "data" / "coco", n=4)
    save_tiny_clip(root / "clip")
    save_full_size(root / "model")
    yield root
    shutil.rmtree(root)


def small(root: Path) -> Path:
    """The overrides that make the study's job one for a CPU."""
    clip = {"model": str(root / "clip")}
    fid = {"extractor": {"class_path": "ClipImageFeatures", "init_args": clip}}
    model = {
        "pipeline": {"class_path": "StableDiffusion", "init_args": {"model": str(root / "model")}},
        "metrics": [
            {"class_path": "FrechetInceptionDistance", "init_args": fid},
            {"class_path": "CLIPScore", "init_args": clip},
        ],
        "sampling": {"steps": 2, "height": 64, "width": 64},
        "samples": ["A dog in a field"],
    }
    data = {
        "source": {"class_path": "CocoDirectory", "init_args": {"root": str(root / "data" / "coco")}},
        "n": 4,
        "batch_size": 2,
    }
    overrides = {
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "model": {"class_path": "GenerationModule", "init_args": model},
        "data": {"class_path": "CocoDataModule", "init_args": data},
    }
    (root / "small.yaml").write_text(yaml.safe_dump(overrides))
    return root / "small.yaml"


def test_full_size_predict_gives_the_audits_counts_and_the_same_images_on_two_processes(place):
    run = ["--config", small(place), "--model.store", place / "store"]
    predict(*run, "--model.output", place / "one")
    (dense,), (pruned,) = (list((place / "one").glob(f"{name}-*")) for name in ("dense", "text_encoder"))
    results = json.loads((pruned / "results.json").read_text())

    assert {"fid", "clip_score", "clip_gap"} <= results["metrics"].keys()
    assert results["comparison"]["dense"] == dense.name
    assert_counts(results)

    images = sorted(path.name for path in (pruned / "images").iterdir())
    assert len(images) == 4
    assert all(read(pruned, name) != read(dense, name) for name in images)
    predict(*run, "--model.output", place / "two", "--model.compare_dense=false", "--trainer.devices=2")
    again = place / "two" / pruned.name
    assert json.loads((again / "results.json").read_text())["speed"]["processes"] == 2
    assert all(read(again, name) == read(pruned, name) for name in images)


def read(directory: Path, name: str) -> bytes:
    return (directory / "images" / name).read_bytes()


def assert_counts(results):
    """What the audit of the study says of 47.5 % / 35 %, from the run's own results."""
    sparsity, pruning = results["sparsity"], results["pruning"]
    parameters = {name: whole["parameters"] for name, whole in sparsity["components"].items()}
    assert parameters == {"text_encoder": TEXT_ENCODER, "unet": UNET, "vae": VAE}
    assert pruning["text_encoder"]["weights"] == TEXT_WEIGHTS
    assert pruning["unet"]["weights"] == UNET_WEIGHTS

    zeros = sparsity["targets"]["zeros"]
    assert zeros == pytest.approx(0.475 * TEXT_WEIGHTS + 0.35 * UNET_WEIGHTS, abs=400)  # half a weight a layer
    assert round(zeros / 1e6, 1) == 242.9
    wholes = ("targets", "prunable", "pipeline")
    assert [round(100 * sparsity[whole]["zero_fraction"], 1) for whole in wholes] == [41.1, 20.1, 18.8]
    assert all(sparsity[whole]["pruned"] == sparsity[whole]["zeros"] == zeros for whole in wholes)
    assert sparsity["nominal"] == pytest.approx((0.475 * TEXT_ENCODER + 0.35 * UNET) / (TEXT_ENCODER + UNET))
    assert round(100 * sparsity["nominal"], 1) == 38.5  # the row of the study's Table 6


@pytest.fixture
def fit(sdprune, tmp_path):
    """Run one of the two configurations for `fit` on the miniature instead."""
    coco = write_coco(tmp_path / "coco", n=4)
    paths = ["--model.pipeline.model=miniature", f"--data.source.root={coco}", f"--model.store={tmp_path / 'store'}"]
    small = ["--trainer.precision=32-true", "--model.sampling.steps=2", "--data.calibration_n=4"]

    def run(config: str, *options: str) -> None:
        told = sdprune("fit", "--config", CONFIGS / config, *paths, *small, "--data.calibration_batch_size=2", *options)
        assert told.code == 0, told.err

    return run


def test_prune_config_saves_a_pipeline(fit, tmp_path):
    fit("prune.yaml", f"--model.output={tmp_path}")
    (saved,) = tmp_path.glob("pruned-*")
    report = json.loads((saved / "pruning_report.json").read_text())
    for name, share in (("text_encoder", 0.475), ("unet", 0.35)):
        weights = report["pruning"][name]["weights"]
        assert report["pruning"][name]["pruned"] == pytest.approx(share * weights, abs=len(report["layers"][name]))
        (file,) = (saved / name).glob("*.safetensors")
        zeros = sum(int((tensor == 0).sum()) for tensor in load_file(file).values())
        assert zeros == report["sparsity"]["components"][name]["zeros"]


def test_calibrate_config_fills_the_store_that_pruning_reads(fit, tmp_path):
    def stored() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}

    fit("calibrate.yaml", "--data.calibration=null")
    before = stored()
    assert len(before) >= 2
    wanda = [f"--model.prune.{name}.criterion=Wanda" for name in ("text_encoder", "unet")]
    fit("prune.yaml", f"--model.output={tmp_path}", *wanda)
    assert list(tmp_path.glob("pruned-text_encoder-wanda*"))
    assert stored() == before
