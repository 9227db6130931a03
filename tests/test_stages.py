"""Every stage of the miniature's recipe runs for a few steps, in order, and leaves a pipeline that draws."""

import json
from pathlib import Path

import pytest
import torch

from sdprune.cli import main
from sdprune.mini.training import Stage
from sdprune.pipelines import Sampling, StableDiffusion

CONFIGS = Path(__file__).parent.parent / "configs" / "mini"
STAGES = ("vae", "text_encoder", "evaluator", "unet")


def train(stage: str, weights: Path, *options: str, steps: int = 3) -> int:
    return main(
        [
            "fit", "--config", str(CONFIGS / f"{stage}.yaml"), f"--trainer.max_steps={steps}", f"--data.steps={steps}",
            "--data.n=16", "--data.batch_size=4", f"--model.weights={weights}", "--model.warmup=1",
            f"--trainer.callbacks.dirpath={weights / 'checkpoints' / stage}",
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
    assert model.prunable == ["text_encoder", "unet"]


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
    assert train("unet", trained, "--model.resume=true", f"--trainer.callbacks.dirpath={tmp_path}", steps=1) == 0
    assert json.loads((trained / "training.json").read_text())["unet"]["resumed"] is True


def test_a_stage_without_its_predecessors_says_which(tmp_path, capsys) -> None:
    assert train("unet", tmp_path) == 2
    assert "run the stage that writes it first" in capsys.readouterr().err
