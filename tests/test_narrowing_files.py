"""Files of narrowed models: what `sdprune.load` makes of them, and which it refuses."""

import json
import shutil

import pytest
import tiny_families
import torch
from command_lines import fit, predict
from lightning import Trainer
from narrowing import ALL
from safetensors.torch import load_file, save_file

import sdprune as package
from sdprune import pipelines
from sdprune.data import CocoDataModule
from sdprune.errors import InputError
from sdprune.mini.source import EmbeddedWorld
from sdprune.modules import PruningModule
from sdprune.pipelines import Sampling
from sdprune.pruning.narrowing import NarrowSpec, find_groups


@pytest.fixture(scope="module")
def narrowed(miniature, tmp_path_factory):
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("narrowed")
    words = ["--model.prune={}", ALL, "--model.narrow.unet.criterion=Magnitude", "--model.narrow.unet.refit=false"]
    words += ["--model.narrow.text_encoder.criterion=Magnitude", "--model.narrow.text_encoder.refit=false"]
    assert main(fit("prune", output, *words, f"--model.directory={output / 'saved'}")) == 0
    return output / "saved"


def test_it_is_a_plain_pipeline_when_sdprune_loads_it(narrowed, tmp_path):
    """Bit by bit the weights of the file, of the classes that diffusers and transformers have, and it saves itself."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = package.load(narrowed)
    assert type(pipe) is StableDiffusionPipeline
    assert (type(pipe.unet), type(pipe.text_encoder)) == (UNet2DConditionModel, CLIPTextModel)
    for name in ("unet", "text_encoder"):
        (file,) = (narrowed / name).glob("*.safetensors")
        stored, loaded = load_file(file), getattr(pipe, name).state_dict()
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(loaded[key], value) for key, value in stored.items())
    card = (narrowed / "README.md").read_text()
    assert "sdprune.load(" in card
    assert "from_pretrained" not in card
    assert "- `unet`, narrowed: 36 of 58 heads" in card  # 2 of 3 in six attentions, 3 of 5 in eight
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red star", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    pipe.save_pretrained(tmp_path / "again")
    again = package.load(tmp_path / "again", torch.float16)
    assert torch.equal(again.unet.mid_block.resnets[0].conv2.weight, pipe.unet.mid_block.resnets[0].conv2.weight.half())
    with pytest.raises(RuntimeError, match="size mismatch"):  # and never by other means, with weights at random
        UNet2DConditionModel.from_pretrained(narrowed / "unet")


def test_a_text_encoder_whose_file_has_older_names(narrowed, tmp_path):
    shutil.copytree(narrowed, tmp_path / "old")
    (file,) = (tmp_path / "old" / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    save_file({f"text_model.{name}": value for name, value in weights.items()}, file, {"format": "pt"})
    loaded = package.load(tmp_path / "old").text_encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


RESNET, ATTENTION = "mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("tensor", "shape", "line"),
    [
        (f"{RESNET}.conv1.weight", (95, 160, 3, 3), "has 95 rows, and a model narrowed from this configuration"),
        (f"{RESNET}.conv1.weight", (176, 160, 3, 3), "a multiple of 16, at most 160"),
        (f"{RESNET}.conv2.weight", (160, 80, 3, 3), "has shape [160, 80, 3, 3], and a model narrowed like this"),
        (f"{RESNET}.norm2.bias", (1,), "has shape [1], and a model narrowed like this one has [96]"),
        (f"{ATTENTION}.to_q.weight", (65, 160), "has 65 rows"),
        (f"{ATTENTION}.to_q.weight", (0, 160), "a multiple of 32, at most 160"),
        (f"{ATTENTION}.to_v.weight", (64, 160), "has shape [64, 160], and a model narrowed like this one has [96, "),
        ("conv_in.weight", (96, 8, 1, 1), "has shape [96, 8, 1, 1]"),
    ],
)  # fmt: skip
def test_a_shape_that_narrowing_cannot_make_is_refused_by_name(sdprune, narrowed, tmp_path, tensor, shape, line):
    shutil.copytree(narrowed, tmp_path / "bad")
    (file,) = (tmp_path / "bad" / "unet").glob("*.safetensors")
    save_file(load_file(file) | {tensor: torch.zeros(shape)}, file, {"format": "pt"})
    with pytest.raises(InputError) as raised:
        package.load(tmp_path / "bad")
    assert f"{tmp_path / 'bad' / 'unet'} is damaged: {tensor} " in str(raised.value)
    assert line in str(raised.value)
    told = sdprune(*predict(tmp_path, "--model.prune={}", f"--model.pipeline.model={tmp_path / 'bad'}"))
    assert (told.code, told.err.count("\n"), tensor in told.err) == (2, 1, True)


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_every_family_is_narrowed_saved_and_loaded(miniature, tmp_path, name):
    """All that it has, measured on its own pictures and refitted; it draws what the model in memory draws."""
    cls, sampling = getattr(pipelines, name), Sampling(steps=2, guidance=4.0, height=32, width=32)
    family = cls(str(tiny_families.save(name, tmp_path / "dense")))
    kinds = {one: {group.kind for group in find_groups(family.meta_module(one))} for one in family.prunable}
    specs = {one: NarrowSpec(**dict.fromkeys(own, 0.5), criterion="Wanda") for one, own in kinds.items()}
    data = CocoDataModule(
        EmbeddedWorld(images=4), calibration=EmbeddedWorld("train", 20), calibration_n=3, calibration_batch_size=2
    )
    module = PruningModule(
        family, {}, sampling, output=str(tmp_path), store=f"{tmp_path}/statistics", narrow=specs,
        directory=f"{tmp_path}/saved",
    )  # fmt: skip
    trainer = Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, enable_progress_bar=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    report = json.loads((tmp_path / "saved" / "pruning_report.json").read_text())["narrowing"]
    for component, groups in report.items():
        assert {one["kind"] for one in groups["groups"] if one["kept"] < one["units"]} == kinds[component]
    again = cls(f"{tmp_path}/saved")
    again.load(torch.float32, torch.device("cpu"))
    drawn = [one.generate(["a red star", "two cats"], [1, 2], sampling).images for one in (family, again)]
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) > 20
