"""Every stage of the miniature's recipe runs for a few steps, in order, and leaves a pipeline that draws."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sdprune.__main__ import main
from sdprune.mini.install import install
from sdprune.mini.training import Stage
from sdprune.pipelines import Sampling, StableDiffusion
from sdprune.pipelines.resolve import RECIPE, SHIPPED

CONFIGS = Path(__file__).parent.parent / "configs" / "mini"
STAGES = ("vae", "text_encoder", "grounding", "evaluator", "unet", "examiner")


def train(stage: str, weights: Path, *options: str, steps: int = 3) -> int:
    return main(
        [
            "fit", "--config", str(CONFIGS / f"{stage}.yaml"), f"--trainer.max_steps={steps}", f"--data.steps={steps}",
            "--data.n=16", "--data.batch_size=4", f"--model.weights={weights}", "--model.warmup=1",
            "--trainer.callbacks.every_n_train_steps=2", "--trainer.accelerator=cpu", *options,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    weights = tmp_path_factory.mktemp("weights")
    for stage in STAGES:
        assert train(stage, weights) == 0, stage
    return weights


def test_all_stages_make_a_pipeline(trained: Path, monkeypatch) -> None:
    monkeypatch.setenv("SDPRUNE_MINIATURE", str(trained))
    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    images = model.generate(["a red star on a sand background"], [1], Sampling(steps=2)).images
    assert images.shape == (1, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert list(model.prunable) == ["text_encoder", "unet"]


def test_losses_are_recorded(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert set(record) == set(STAGES)
    for stage in STAGES:
        assert record[stage]["steps"] == 3
        assert record[stage]["final_loss"] > 0


def test_an_interrupted_stage_goes_on_from_its_checkpoint(trained: Path, monkeypatch) -> None:
    """The first run left its last checkpoint at step 2, so that a run of 5 steps makes 3."""
    made = []
    step = Stage.training_step
    monkeypatch.setattr(Stage, "training_step", lambda self, batch: made.append(1) or step(self, batch))
    assert train("vae", trained, steps=5) == 0
    assert len(made) == 3
    assert json.loads((trained / "training.json").read_text())["vae"]["steps"] == 5


def test_a_stage_may_continue_from_finished_weights(trained: Path, tmp_path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(trained, weights)
    assert train("unet", weights, "--model.resume=true", f"--trainer.callbacks.dirpath={tmp_path}", steps=1) == 0
    assert json.loads((weights / "training.json").read_text())["unet"]["resumed"] is True
    assert json.loads((weights / "training.json").read_text())["unet"]["steps"] == 4


def test_the_decoder_may_go_on_alone(trained: Path, tmp_path) -> None:
    from diffusers import AutoencoderKL

    weights = tmp_path / "weights"
    shutil.copytree(trained, weights)
    shutil.rmtree(weights / "checkpoints")
    assert train("vae", weights, "--model.resume=true", "--model.decoder_only=true") == 0
    old, new = (AutoencoderKL.from_pretrained(where / "parts" / "vae").state_dict() for where in (trained, weights))
    for name, value in new.items():
        encoder = name.startswith(("encoder.", "quant_conv."))
        assert value.equal(old[name]) or not encoder, name
    assert not new["decoder.conv_out.weight"].equal(old["decoder.conv_out.weight"])


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_readmes_training_loop_leaves_the_shipped_weights_alone(tmp_path, monkeypatch, capsys) -> None:
    """By default a stage trains into runs/miniature, and says how far it is and where it saved."""
    monkeypatch.chdir(tmp_path)
    before = hashes(SHIPPED)
    options = ["--trainer.max_steps=3", "--data.steps=3", "--data.n=16", "--data.batch_size=4"]
    assert main(["fit", "--config", str(CONFIGS / "vae.yaml"), *options, "--trainer.accelerator=cpu"]) == 0
    assert hashes(SHIPPED) == before
    out = capsys.readouterr().out
    assert "vae: step 3 of 3, loss " in out
    assert "Saved: runs/miniature/parts/vae, after 3 steps" in out
    assert json.loads(Path("runs/miniature/training.json").read_text())["vae"]["steps"] == 3
    assert Path("runs/miniature/checkpoints/vae/last.ckpt").exists()


def test_training_into_the_package_is_refused(capsys) -> None:
    assert train("vae", SHIPPED) == 2
    assert "train into another directory" in capsys.readouterr().err


def test_a_finished_stage_is_left_as_it_is(trained: Path, capsys) -> None:
    """Its last checkpoint lies at the last step."""
    assert train("vae", trained, steps=6) == 0
    before = hashes(trained / "parts")
    record = (trained / "training.json").read_text()
    assert train("vae", trained, steps=6) == 0
    assert "vae: already trained, 6 steps" in capsys.readouterr().out
    assert hashes(trained / "parts") == before
    assert (trained / "training.json").read_text() == record


def test_training_a_part_again_leaves_the_pipeline_whole(trained: Path, tmp_path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(trained, weights)
    before = hashes(weights / "pipeline")
    shutil.rmtree(weights / "checkpoints")
    assert train("vae", weights, steps=1) == 0
    assert hashes(weights / "pipeline") == before
    assert hashes(weights / "parts") != hashes(trained / "parts")


def test_the_recipe_is_what_the_configurations_say() -> None:
    configured = {stage: yaml.safe_load((CONFIGS / f"{stage}.yaml").read_text()) for stage in RECIPE}
    assert {stage: config["trainer"]["max_steps"] for stage, config in configured.items()} == RECIPE


def test_a_partly_trained_miniature_is_told(trained: Path) -> None:
    code = "from sdprune.pipelines.resolve import resolve; [resolve('miniature', 'pipeline') for _ in range(3)]"
    environment = os.environ | {"SDPRUNE_MINIATURE": str(trained)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"sdprune: warning: the miniature in {trained} is only partly trained: vae (")
    assert "of 4000 steps), text_encoder (3 of 800 steps), grounding (3 of 800 steps), evaluator (3 of" in done.stderr


def test_install_takes_a_whole_miniature_only(trained: Path, tmp_path) -> None:
    def run(directory: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "sdprune.mini.install", str(directory)]
        return subprocess.run(command, capture_output=True, text=True)

    before = hashes(SHIPPED)
    for directory, words in ((tmp_path, "holds no trained miniature"), (trained, "is only partly trained, vae (")):
        done = run(directory)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert hashes(SHIPPED) == before
    package, whole = tmp_path / "package" / "weights", tmp_path / "whole"
    shutil.copytree(SHIPPED, package)
    shutil.copytree(trained, whole)
    record = {stage: {"steps": steps} for stage, steps in RECIPE.items()}
    (whole / "training.json").write_text(json.dumps(record))
    install(whole, package)
    wanted = {name: value for name, value in hashes(whole).items() if not name.startswith(("parts", "checkpoints"))}
    assert hashes(package) == wanted
    assert [path.name for path in package.parent.iterdir()] == ["weights"]


def test_a_stage_without_its_predecessors_says_which(tmp_path, capsys) -> None:
    assert train("unet", tmp_path) == 2
    assert "run the stage that writes it first" in capsys.readouterr().err


def test_an_encoder_goes_on_under_another_vocabulary(trained: Path, tmp_path) -> None:
    """Tokens that both vocabularies have keep their embeddings."""
    from transformers import CLIPTextModel, CLIPTokenizer

    from sdprune.mini.models import build_clip, text_tower
    from sdprune.mini.tokenizer import train_tokenizer

    weights, before = tmp_path / "weights", train_tokenizer(captions=20)
    shutil.copytree(trained, weights)
    shutil.rmtree(weights / "checkpoints")
    text_tower(build_clip(before, 6, 1, 32)).save_pretrained(weights / "parts" / "text_encoder")
    before.save_pretrained(weights / "parts" / "tokenizer")
    old = CLIPTextModel.from_pretrained(weights / "parts" / "text_encoder").state_dict()
    assert train("text_encoder", weights, "--model.resume=true", "--model.lr=1e-9", steps=1) == 0
    new = CLIPTextModel.from_pretrained(weights / "parts" / "text_encoder").float().state_dict()
    after = CLIPTokenizer.from_pretrained(weights / "parts" / "tokenizer")
    table = "embeddings.token_embedding.weight"
    assert len(new[table]) == len(after) > len(before)
    common = before.get_vocab().keys() & after.get_vocab().keys()
    assert len(common) > 500
    moved = [token for token in common if before.get_vocab()[token] != after.get_vocab()[token]]
    assert moved
    for token in common:
        row, other = new[table][after.get_vocab()[token]], old[table][before.get_vocab()[token]]
        torch.testing.assert_close(row, other, rtol=1e-3, atol=1e-4)
    deep = "encoder.layers.3.mlp.fc1.weight"
    torch.testing.assert_close(new[deep], old[deep], rtol=1e-3, atol=1e-4)
