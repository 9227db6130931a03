"""Pruning into a directory, and calibration, on an untrained miniature."""

import json
import re

import pytest
import torch
from command_lines import fit, predict, process
from safetensors.torch import load_file

WANDA = ["--model.prune.unet.criterion=Wanda", "--model.prune.text_encoder.criterion=Wanda"]


def saved(output):
    (directory,) = output.glob("pruned-*")
    return directory


def weights(pipeline, component):
    (file,) = (pipeline / component).glob("*.safetensors")
    return load_file(file)


def counts_are_exact(directory, original, precision=torch.float32):
    """Zeros of each layer as reported; every other weight as it was; the asked share of each layer."""
    report = json.loads((directory / "pruning_report.json").read_text())
    assert set(report["layers"]) == {"text_encoder", "unet"}
    for component, layers in report["layers"].items():
        now, before = weights(directory, component), weights(original, component)
        sparsity = {"text_encoder": 0.475, "unet": 0.35}[component]
        by_name = {f"{layer['name']}.weight": layer for layer in layers}
        assert now.keys() == before.keys()
        for name, weight in now.items():
            assert weight.dtype == precision
            old = before[name].to(precision)
            if name in by_name:
                layer = by_name[name]
                assert layer["weights"] == weight.numel()
                assert layer["zeros"] == int((weight == 0).sum())
                assert layer["pruned"] == int(weight.numel() * sparsity + 0.5)
                assert layer["zeros"] >= layer["pruned"]
                survived = weight != 0
                assert torch.equal(weight[survived], old[survived])
                assert old[~survived].abs().max() <= old[survived].abs().min() or "Wanda" in str(report)
            else:
                assert torch.equal(weight, old)
        zeros = sum(int((weight == 0).sum()) for weight in now.values())
        assert report["sparsity"]["components"][component]["zeros"] == zeros
    for name, weight in weights(directory, "vae").items():
        assert torch.equal(weight, weights(original, "vae")[name].to(precision))


def test_saved_pipeline(sdprune, miniature, tmp_path):
    from diffusers import DiffusionPipeline

    told = sdprune(*fit("prune", tmp_path))
    assert (told.code, told.err) == (0, "")
    directory = saved(tmp_path)
    assert f"Saved: {directory}" in told.out
    assert directory.name.startswith("pruned-text_encoder-magnitude-0.475-unet-magnitude-0.35-")
    counts_are_exact(directory, miniature / "pipeline")
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "magnitude" in card.lower()
    assert str(tmp_path) not in card + (directory / "pruning_report.json").read_text()
    assert not list((tmp_path / "statistics").glob("*"))
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red star", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_without_calibration_no_captions_need_be_there(sdprune, tmp_path):
    nowhere = ["--data.source=TextFile", f"--data.source.path={tmp_path}/none.txt"]
    config = [option for option in fit("prune", tmp_path) if not option.startswith("--data.source")]
    assert sdprune(*config, *nowhere).code == 0
    told = sdprune(*config, *nowhere, *WANDA, "--model.prune.unet.sparsity=0.4")
    assert told.code == 2
    assert "none.txt" in told.err


def test_saved_in_half_precision(sdprune, miniature, tmp_path):
    assert sdprune(*fit("prune", tmp_path, "--trainer.precision=16-true")).code == 0
    counts_are_exact(saved(tmp_path), miniature / "pipeline", torch.float16)


def test_a_saved_pipeline_is_left_as_it_is(sdprune, miniature, tmp_path):
    assert sdprune(*fit("prune", tmp_path)).code == 0
    directory = saved(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    told = sdprune(*fit("prune", tmp_path))
    assert told.code == 0
    assert re.search(
        rf"This was finished already, \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d.*: {directory}$", told.out, re.MULTILINE
    )
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_the_saved_pipeline_draws_what_pruning_in_memory_draws(sdprune, miniature, tmp_path):
    assert sdprune(*fit("prune", tmp_path)).code == 0
    assert sdprune(*predict(tmp_path / "memory")).code == 0
    nothing = ["--model.prune.unet.sparsity=0", "--model.prune.text_encoder.sparsity=0"]
    again = predict(tmp_path / "saved", f"--model.pipeline.model={saved(tmp_path)}", *nothing)
    assert sdprune(*again).code == 0
    (pruned,), (loaded,) = tmp_path.glob("memory/text_encoder-*/images"), tmp_path.glob("saved/dense-*/images")
    own = {path.name: path.read_bytes() for path in pruned.iterdir()}
    assert len(own) == 7
    assert own == {path.name: path.read_bytes() for path in loaded.iterdir()}


def test_calibration_is_gathered_once(sdprune, tmp_path, monkeypatch):
    from sdprune.pipelines import StableDiffusion

    told = sdprune(*fit("calibrate", tmp_path))
    assert (told.code, told.err) == (0, "")
    assert "text_encoder input_norm: gathered" in told.out
    files = sorted((tmp_path / "statistics").rglob("*.safetensors"))
    assert [file.parent.name.rpartition("-")[0] for file in files] == [
        "text_encoder-hessian", "text_encoder-input_norm", "unet-hessian", "unet-input_norm",
    ]  # fmt: skip
    stamps = [file.stat().st_mtime_ns for file in files]
    norms = load_file(files[3])
    assert all(bool((value >= 0).all()) and value.dtype == torch.float32 for value in norms.values())
    assert {value.shape[:2] for value in norms.values()} == {(2, 1)}  # two steps
    for passes in ("encode", "generate"):
        monkeypatch.setattr(StableDiffusion, passes, lambda *args, **kwargs: pytest.fail("a forward pass"))
    assert "unet input_norm: already in the store" in sdprune(*fit("calibrate", tmp_path)).out
    assert sdprune(*fit("prune", tmp_path, *WANDA)).code == 0
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert sorted((tmp_path / "statistics").rglob("*.safetensors")) == files
    assert saved(tmp_path).name.startswith("pruned-text_encoder-wanda-0.475-unet-wanda-0.35")


def test_predict_finds_the_calibration_of_fit(sdprune, tmp_path, monkeypatch):
    from sdprune.modules.calibrator import Calibrator

    same = ["--data.source.split=train", "--data.calibration=null"]
    assert sdprune(*fit("calibrate", tmp_path)).code == 0
    monkeypatch.setattr(Calibrator, "_visit", lambda *args: pytest.fail("gathered again"))
    options = ["--data.source.images=20", *same, *WANDA, "--model.compare_dense=false"]
    told = sdprune(*predict(tmp_path, *options))
    assert (told.code, told.err) == (0, "")


def test_two_processes(sdprune, miniature, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert sdprune(*fit("prune", one, *WANDA)).code == 0
    done = process(fit("prune", two, *WANDA, "--trainer.devices=2"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    assert done.stdout.count("Saved: ") == 1
    files = {path.relative_to(one): path.read_bytes() for path in one.rglob("*.safetensors")}
    assert len(files) == 5
    assert files == {path.relative_to(two): path.read_bytes() for path in two.rglob("*.safetensors")}
    reports = [json.loads((saved(path) / "pruning_report.json").read_text()) for path in (one, two)]
    assert reports[0] == reports[1]
    assert all(part["mask_hash"] for part in reports[0]["pruning"].values())
    counts_are_exact(saved(one), miniature / "pipeline")
