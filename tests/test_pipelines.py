"""Stable Diffusion as a family: what it loads, draws and says of itself, on the untrained miniature."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdprune.errors import InputError
from sdprune.pipelines import Sampling, StableDiffusion

PROMPTS = ["a red star", "a large green circle on a black background", "two cats", "a red star"]
SEEDS = [1, 2, 3, 4]
QUICK = Sampling(steps=2)
CPU = torch.device("cpu")
PARTS = ("text_encoder", "unet", "vae")


def load(model: object, **options: str) -> StableDiffusion:
    family = StableDiffusion(str(model), **options)
    family.load(torch.float32, CPU)
    return family


@pytest.fixture(scope="module")
def directory(miniature):
    return miniature / "pipeline"


@pytest.fixture(scope="module")
def family(miniature):
    return load("miniature")


@pytest.fixture
def copy(directory, tmp_path):
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def weights(part: Path) -> Path:
    (file,) = part.glob("*.safetensors")
    return file


# --- what is loaded -------------------------------------------------------------------------------------------


def test_what_turns_text_into_latents_can_be_pruned(miniature):
    assert list(StableDiffusion("miniature").prunable) == ["text_encoder", "unet"]


def test_half_precision_on_disk_is_loaded_exactly_in_single(family, directory):
    assert family.components.keys() == set(PARTS)
    for name in PARTS:
        stored, loaded = load_file(weights(directory / name)), family.components[name].state_dict()
        assert stored
        assert {value.dtype for value in stored.values()} == {torch.float16}
        assert all(loaded[key].dtype == torch.float32 for key in stored)
        assert all(torch.equal(loaded[key], value.float()) for key, value in stored.items())
        assert not any(parameter.requires_grad for parameter in family.components[name].parameters())


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_a_file_lacks_are_not_made_up(copy, part):
    file = weights(copy / part)
    state = load_file(file)
    lost = [name for name in state if name.endswith("weight")][5]
    save_file({name: value for name, value in state.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{part} lacks 1 of its weights, such as '{lost}'"):
        load(copy)


def test_a_saved_pipeline_does_not_tell_where_it_came_from(copy, tmp_path):
    load(copy).save(tmp_path / "saved")
    for config in (tmp_path / "saved").rglob("*.json"):
        assert str(tmp_path) not in config.read_text()


def test_the_layout_of_old_hub_repositories_is_read(copy, family):
    """A `text_model.` level in the text encoder's names, its positions as a tensor, a class that is gone."""
    file = weights(copy / "text_encoder")
    state = {f"text_model.{name}": value for name, value in load_file(file).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(state, file, metadata={"format": "pt"})
    index = json.loads((copy / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "feature_extractor").mkdir()
    old, own = load(copy).components["text_encoder"].state_dict(), family.components["text_encoder"].state_dict()
    assert old.keys() == own.keys()
    assert all(torch.equal(old[name], own[name]) for name in own)


def test_a_variant_is_read_when_asked_for(directory, tmp_path, family):
    StableDiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float16, safety_checker=None).save_pretrained(
        tmp_path, variant="fp16"
    )
    assert weights(tmp_path / "unet").name.endswith(".fp16.safetensors")
    loaded = load(tmp_path, variant="fp16").components["unet"]
    own = family.components["unet"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), own.parameters(), strict=True))
    assert_told("cannot be read", tmp_path)


def test_a_variant_that_is_not_there_is_told(directory):
    assert_told("fp8", directory, variant="fp8")


def test_pickled_weights_are_refused(copy):
    file = weights(copy / "unet")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert_told("safetensors", copy)


def test_a_directory_that_is_missing_is_told(tmp_path):
    assert_told("does not exist", tmp_path / "none")


def test_a_hub_id_without_network_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_told("'someone/some-model' at revision 'main'", "someone/some-model")


def assert_told(part: str, model: object, **options: str) -> None:
    with pytest.raises(InputError) as error:
        load(model, **options)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


# --- what is drawn --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(family):
    return family.generate(PROMPTS, SEEDS, QUICK).images


def test_images_are_bytes_in_the_models_own_size(images):
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 64, 64)
    assert images.device == CPU
    assert len(images.unique()) > 20


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(family, images):
    order = [3, 1, 0, 2]
    shuffled = family.generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order], QUICK).images
    assert torch.equal(shuffled, images[order])
    padded = family.generate([PROMPTS[0], *[PROMPTS[1]] * 3], [SEEDS[0], *[SEEDS[1]] * 3], QUICK).images
    assert torch.equal(padded[:2], images[:2])
    assert torch.equal(padded[1], padded[3])
    assert not torch.equal(images[0], images[3])  # one prompt, two seeds
    assert not torch.equal(
        padded[0], family.generate(PROMPTS[1:2] * 4, SEEDS, QUICK).images[0]
    )  # one seed, two prompts


def test_sizes_and_latents(family):
    sampling = Sampling(steps=1, height=32, width=96)
    assert family.generate(PROMPTS[:2], SEEDS[:2], sampling).images.shape == (2, 3, 32, 96)
    assert family.generate(PROMPTS[:2], SEEDS[:2], sampling, decode=False).images.shape == (2, 8, 4, 12)


def test_a_scheduler_of_a_run_is_used_in_that_run_alone(family, images, tmp_path):
    other = family.generate(PROMPTS, SEEDS, Sampling(steps=2, scheduler="EulerDiscreteScheduler")).images
    assert not torch.equal(other, images)
    family.save(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert torch.equal(family.generate(PROMPTS, SEEDS, QUICK).images, images)


def test_a_saved_pipeline_draws_the_same_images(family, images, tmp_path):
    family.save(tmp_path)
    assert torch.equal(load(tmp_path).generate(PROMPTS, SEEDS, QUICK).images, images)


# --- what a fingerprint sees ----------------------------------------------------------------------------------


def test_the_description_follows_the_files_and_not_their_place(directory, copy):
    description = StableDiffusion(str(directory)).describe()
    (copy / "README.md").write_text("A model card.")
    (copy / "pruning_report.json").write_text("{}")
    assert StableDiffusion(str(copy)).describe() == description
    state = load_file(weights(copy / "unet"))
    state["conv_in.bias"][0] += 1
    save_file(state, weights(copy / "unet"), metadata={"format": "pt"})
    assert StableDiffusion(str(copy)).describe() != description


def test_the_description_follows_the_configurations(directory, copy):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("v_prediction", "epsilon"))
    assert StableDiffusion(str(copy)).describe() != StableDiffusion(str(directory)).describe()
