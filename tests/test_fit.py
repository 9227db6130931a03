"""Pruning into a directory, and calibration, on an untrained miniature."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from command_lines import fit, predict, process
from safetensors.torch import load_file

from sdprune.pipelines import DiffusersFamily
from sdprune.pruning.allocation.owl import OWL
from sdprune.pruning.criteria.sparsegpt import SparseGPT

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


def test_a_finished_model_needs_no_statistics(sdprune, tmp_path, monkeypatch):
    command = fit("prune", tmp_path, *WANDA)
    assert sdprune(*command).code == 0
    shutil.rmtree(tmp_path / "statistics")
    monkeypatch.setattr(DiffusersFamily, "load", lambda *args: pytest.fail("the model is not needed"))
    told = sdprune(*command)
    assert (told.code, told.err) == (0, "")
    assert "finished already" in told.out
    assert not list((tmp_path / "statistics").rglob("*.safetensors"))


def test_one_of_two_equal_runs_saves(sdprune, tmp_path):
    """The other one waits for it."""
    command = [sys.executable, "-m", "sdprune", *fit("prune", tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [one.communicate(timeout=300) for one in both]
    assert [(one.returncode, err) for one, (_, err) in zip(both, told, strict=True)] == [(0, ""), (0, "")]
    assert sorted("finished already" in out for out, _ in told) == [False, True]
    assert not list(tmp_path.glob("*.part"))


def test_saved_pipeline(sdprune, miniature, tmp_path):
    from diffusers import DiffusionPipeline

    told = sdprune(*fit("prune", tmp_path))
    assert (told.code, told.err) == (0, "")
    directory = saved(tmp_path)
    assert f"Saved: {directory}" in told.out
    assert directory.name.startswith("pruned-text_encoder-magnitude-layer-0.475-unet-magnitude-layer-0.35-")
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


def test_n_of_m_needs_no_sparsity(sdprune, miniature, tmp_path):
    told = sdprune(*fit("prune", tmp_path, "--model.prune={unet: {sparsity: null, granularity: '2:4'}}"))
    assert (told.code, told.err) == (0, "")
    directory = saved(tmp_path)
    assert directory.name.startswith("pruned-unet-magnitude-2_4-")
    before = weights(miniature / "pipeline", "unet")
    for layer in json.loads((directory / "pruning_report.json").read_text())["layers"]["unet"]:
        weight = before[f"{layer['name']}.weight"]
        assert layer["pruned"] == weight.shape[0] * (weight.shape[1] // 4) * 2
    told = sdprune(*fit("prune", tmp_path, "--model.prune.unet.granularity=2:4"))  # the configuration gives 0.35
    assert told.code == 2
    line = "--model.prune.unet.granularity 2:4 prunes 0.5, not 0.35: leave sparsity out, or set it to 0.5."
    assert told.err == f"sdprune: error: {line}\n"


def test_n_of_m_without_quotes_is_explained(sdprune, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: {class_path: PruningModule, init_args: {prune: {unet: {granularity: 2:4}}}}")
    told = sdprune(*fit("prune", tmp_path, "--config", str(config)))  # YAML reads 2 * 60 + 4
    assert told.code == 2
    assert "granularity is 124: give text, in quotes" in told.err
    assert told.err.count("\n") == 1


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
    assert saved(tmp_path).name.startswith("pruned-text_encoder-wanda-row-0.475-unet-wanda-row-0.35")


def test_predict_finds_the_calibration_of_fit(sdprune, tmp_path, monkeypatch):
    from sdprune.calibration.collect import Collector

    same = ["--data.source.split=train", "--data.calibration=null"]
    assert sdprune(*fit("calibrate", tmp_path)).code == 0
    monkeypatch.setattr(Collector, "_visit", lambda *args: pytest.fail("gathered again"))
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


def test_a_directory_of_ones_choice(sdprune, miniature, tmp_path):
    """It gets the result as a whole, and never takes the place of something else."""
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    words = fit("prune", tmp_path, f"--model.directory={chosen}")
    told = sdprune(*words)
    assert (told.code, told.err) == (0, "")
    assert f"Saved: {chosen}" in told.out
    counts_are_exact(chosen, miniature / "pipeline")
    assert not list(tmp_path.glob("pruned-*"))
    assert not list(tmp_path.glob(".*.part"))
    before = {path: path.stat().st_mtime_ns for path in chosen.rglob("*")}
    assert re.search(rf"This was finished already, [-0-9 :+]+: {chosen}", sdprune(*words).out)
    told = sdprune(*words, "--model.prune.unet.sparsity=0.4")
    assert told.code == 2
    assert f"{chosen} holds another pruned model: choose another --model.directory" in told.err
    assert {path: path.stat().st_mtime_ns for path in chosen.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    told = sdprune(*fit("prune", tmp_path, f"--model.directory={tmp_path / 'mine'}"))
    assert told.code == 2
    assert "mine holds other files" in told.err


def card_of(directory):
    _, head, body = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_has_the_scores_of_the_same_pruning(sdprune, tmp_path):
    """From the record in the same output; another pruning's record is not taken."""
    assert sdprune(*fit("prune", tmp_path, f"--model.directory={tmp_path / 'unmeasured'}")).code == 0
    head, body = card_of(tmp_path / "unmeasured")
    assert head["license"] == "apache-2.0"
    assert "base_model" not in head
    assert "Not measured yet." in body
    (command,) = re.findall(r"```bash\n(.*)\n```", body)
    assert sdprune(*predict(tmp_path)).code == 0
    assert sdprune(*predict(tmp_path, "--model.prune.unet.sparsity=0.4")).code == 0
    told = sdprune(*fit("prune", tmp_path))
    (record,) = tmp_path.glob("text_encoder-*-unet-magnitude-layer-0.35-*")
    assert f"with the scores of {record.name}" in told.out
    _, body = card_of(saved(tmp_path))
    results = json.loads((record / "results.json").read_text())
    assert f"Record `{record.name}`: n = 7, 2 steps, guidance 2.5, seed 0." in body
    fid, change = results["metrics"]["fid"], results["comparison"]
    interval = f"{change['fid_diff']:+.4f} [{change['fid_diff_low']:+.4f}, {change['fid_diff_high']:+.4f}]"
    assert f"| fid | {fid:.4f} | {interval} | FrechetInceptionDistance, clip:miniature, reference of 7 images |" in body
    assert "unet-magnitude-layer-0.4" not in body
    # The command for one that is not measured gives the same images' scores.
    words = shlex.split(command.replace("<this directory>", str(tmp_path / "unmeasured")))
    assert words[:4] == ["sdprune", "predict", "--config", "CONFIG"]
    assert sdprune(*predict(tmp_path / "alone", *words[4:])).code == 0
    (alone,) = (tmp_path / "alone").glob("dense-*/results.json")
    assert json.loads(alone.read_text())["metrics"]["fid"] == fid


def test_the_card_names_the_base_model_and_its_licence(sdprune, miniature, tmp_path):
    """A local model's own card says where it comes from; so does that of a model that was pruned twice."""
    local = tmp_path / "local"
    shutil.copytree(miniature / "pipeline", local)
    (local / "README.md").write_text("---\nbase_model: some/model\nlicense: openrail++\n---\n# A model\n")
    for number in ("one", "two"):
        words = fit("prune", tmp_path, f"--model.pipeline.model={local}", f"--model.directory={tmp_path / number}")
        assert sdprune(*words).code == 0
        local = tmp_path / number
        head, body = card_of(local)
        assert (head["base_model"], head["license"]) == ("some/model", "openrail++")
        assert "Base model: some/model." in body
        assert str(tmp_path) not in body


@pytest.mark.parametrize(
    ("prune", "name"),
    [
        ({"unet": {"sparsity": 0.35, "criterion": "Wanda", "allocation": "OWL"}}, "unet-owl-wanda-row-0.35"),
        ({"unet": {"sparsity": 0.5, "granularity": "2:4"}}, "unet-magnitude-2_4"),
        (
            {"unet": {"sparsity": 0.35, "criterion": "Wanda", "allocation": OWL(m=5, lambda_=0.1), "mode": "original"}},
            "unet-owl-m5-lambda0.1-wanda-row-0.35-original",
        ),
        (
            {
                "text_encoder": {"sparsity": 0.475, "criterion": "Wanda", "order": "sequential", "mode": "original"},
                "unet": {"sparsity": 0.35, "criterion": "Wanda", "order": "sequential", "mode": "original"},
            },
            "text_encoder-wanda-row-0.475-unet-wanda-row-0.35-sequential-original",
        ),
        (
            {
                "text_encoder": {"sparsity": 0.475, "mode": "original", "order": "sequential"},
                "unet": {"sparsity": 0.35, "criterion": SparseGPT(damping=0.1), "timesteps": "linear"},
            },
            "text_encoder-magnitude-0.475-original-unet-sparsegpt-damping0.1-0.35-linear",
        ),
        (
            {
                "text_encoder": {"sparsity": 0.475, "criterion": "SparseGPT", "allocation": OWL(m=5)},
                "unet": {"sparsity": 0.35, "criterion": "SparseGPT", "allocation": OWL(m=5, lambda_=0.123456)},
            },
            "text_encoder-owl-m5-sparsegpt-0.475-unet-owl-m5-lambda0.123456-sparsegpt-0.35",
        ),
        (
            {
                "text_encoder": {"sparsity": 0.475, "criterion": "SparseGPT", "allocation": OWL(m=5)},
                "unet": {"sparsity": 0.35, "criterion": "SparseGPT", "allocation": OWL(m=5.25, lambda_=0.123456)},
            },
            "text_encoder-owl-sparsegpt-0.475-unet-owl-sparsegpt-0.35",
        ),
        ({"unet": {"band": (0.1, 0.2)}}, "unet-magnitude-layer-band-0.1-0.2"),
        ({"unet": {"sparsity": 0.3, "granularity": "row"}}, "unet-magnitude-row-0.3"),
        (
            {
                "text_encoder": {"sparsity": 0.475, "criterion": "SparseGPT", "allocation": "GlobalRanking"},
                "unet": {"sparsity": 0.35, "criterion": "SparseGPT", "allocation": "GlobalRanking"},
            },
            "text_encoder-globalranking-sparsegpt-0.475-unet-globalranking-sparsegpt-0.35",
        ),
    ],
)
def test_directories_are_named_after_the_whole_method(prune, name):
    from sdprune.pruning import PruneSpec
    from sdprune.runs.label import label

    assert label({component: PruneSpec(**choices) for component, choices in prune.items()}) == name
    assert len(f"pruned-{name}-0123456789ab") < 100
