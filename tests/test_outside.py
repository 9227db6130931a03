"""Data from outside is never run, and what is wrong with it is told in one line before anything is drawn."""

import contextlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import edit, write_coco
from command_lines import fit, predict, process
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_tiny_clip

from sdprune.data import HubDataset
from sdprune.errors import InputError
from sdprune.metrics import ClipImageFeatures, Statistics
from sdprune.pipelines import Sampling, StableDiffusion

CANARY = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\nclass AutoencoderKL: pass\n"


@pytest.fixture
def model(miniature, tmp_path):
    return Path(shutil.copytree(miniature / "pipeline", tmp_path / "model"))


def change(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def told(sdprune, output, *options):
    """The one line of a run that is refused before anything is drawn."""
    result = sdprune(*predict(output, *options))
    assert_line(result, output)
    return result.err


def assert_line(result, output):
    assert result.code == 2, (result.code, result.out, result.err)
    assert result.err.startswith("sdprune: error: ")
    assert result.err.count("\n") == 1, result.err
    assert not list(output.glob("*/images/*"))


# --- nothing is run --------------------------------------------------------------------------------------------

FOREIGN = {
    "vae": ["my_module", "AutoencoderKL"],
    "unet": ["my_module", "AutoencoderKL"],
    "text_encoder": ["transformers", "AutoModel"],
    "tokenizer": ["transformers", "AutoTokenizer"],
    "scheduler": ["my_module", "DDIMScheduler"],
}


def plant(model, directory):
    """A module in the working directory and in every part, named wherever libraries look for code."""
    for place in (directory, model, *(part for part in model.iterdir() if part.is_dir())):
        (place / "my_module.py").write_text(CANARY)
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "my_module.AutoencoderKL")
    for config in model.glob("*/*config.json"):
        change(config, auto_map=auto)


@pytest.mark.parametrize("part", FOREIGN)
def test_code_that_a_model_directory_names_is_not_run(sdprune, model, tmp_path, monkeypatch, part):
    plant(model, tmp_path)
    change(model / "model_index.json", **{part: FOREIGN[part]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m sdprune` has it
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    line = told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")
    assert ".".join(FOREIGN[part]) in line
    assert "not supported" in line
    assert not list(tmp_path.rglob("executed"))
    assert "my_module" not in sys.modules


def test_a_configuration_that_maps_to_code_is_read_without_it(sdprune, model, tmp_path, monkeypatch):
    plant(model, tmp_path)
    change(model / "text_encoder" / "config.json", attn_implementation="somebody/kernel")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    result = sdprune(*predict(tmp_path / "runs", f"--model.pipeline.model={model}", "--data.n=2"))
    assert result.code == 0, result.err
    assert not list(tmp_path.rglob("executed"))


def test_a_pipeline_of_its_own_code_is_refused(sdprune, model, tmp_path):
    plant(model, tmp_path)
    change(model / "model_index.json", _class_name=["my_module", "AutoencoderKL"])
    assert "names no pipeline class" in told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")
    assert not list(tmp_path.rglob("executed"))


def test_the_cell_of_a_sweep_in_a_process_of_its_own_runs_no_code(miniature, model, tmp_path, monkeypatch):
    plant(model, tmp_path)
    change(model / "model_index.json", vae=FOREIGN["vae"])
    monkeypatch.chdir(tmp_path)
    done = process(predict(tmp_path / "runs", f"--model.pipeline.model={model}"), interpreter=("-m", "sdprune"))
    assert done.returncode == 2
    assert "my_module.AutoencoderKL" in done.stderr
    assert not list(tmp_path.rglob("executed"))


def test_a_clip_model_runs_no_code(tmp_path, monkeypatch):
    folder = save_tiny_clip(tmp_path / "clip")
    (folder / "my_module.py").write_text(CANARY)
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor"), "my_module.AutoencoderKL")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        change(folder / name, auto_map=auto)
    change(folder / "config.json", attn_implementation="somebody/kernel")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    ClipImageFeatures(str(folder)).load("cpu")
    assert not list(tmp_path.rglob("executed"))


def test_a_dataset_runs_no_code(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(CANARY)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InputError, match=r"Split 'train' of .* cannot be loaded"):
        HubDataset(str(tmp_path / "set"), "train").load()
    with pytest.raises(InputError, match=r"Split 'train' of .* cannot be loaded"):
        HubDataset(str(tmp_path / "set" / "set.py"), "train").load()
    assert not list(tmp_path.rglob("executed"))


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickled_weights_are_not_opened(sdprune, model, tmp_path, suffix):
    (file,) = (model / "unet").glob("*.safetensors")
    file.unlink()
    torch.save(Canary(tmp_path / "executed"), file.with_suffix(suffix))
    assert "no safetensors" in told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")
    assert not (tmp_path / "executed").exists()


def test_pickles_in_statistics_are_not_opened(sdprune, tmp_path):
    file = tmp_path / "reference.npz"
    np.savez(file, mu=np.array([Canary(tmp_path / "executed")], dtype=object), sigma=np.eye(1))
    assert "reference.npz is not a readable npz" in told(sdprune, tmp_path / "runs", f"--data.reference={file}")
    np.array([Canary(tmp_path / "executed")], dtype=object).dump(file)
    assert "reference.npz is not a readable npz" in told(sdprune, tmp_path / "runs", f"--data.reference={file}")
    assert not (tmp_path / "executed").exists()


def test_pickles_in_a_record_are_not_opened(sdprune, tmp_path):
    assert sdprune(*predict(tmp_path / "runs", "--data.n=2")).code == 0
    for rows in (tmp_path / "runs").glob("*/rows.npz"):
        np.savez(rows, ids=np.array([Canary(tmp_path / "executed")] * 2, dtype=object))
    again = sdprune(*predict(tmp_path / "runs", "--data.n=2"))
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert not (tmp_path / "executed").exists()


# --- bombs -----------------------------------------------------------------------------------------------------


def test_a_zip_bomb_is_not_unpacked(sdprune, tmp_path):
    file = tmp_path / "reference.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mu", "sigma"):
            with archive.open(f"{name}.npy", "w") as part:
                np.lib.format.write_array_header_1_0(part, {"descr": "<f8", "fortran_order": False, "shape": (2**24,)})
                for _ in range(2**4):
                    part.write(bytes(2**23))
    assert file.stat().st_size < 2**20
    assert "unpack to 268," in told(sdprune, tmp_path / "runs", f"--data.reference={file}")


def test_a_picture_bomb_is_not_unpacked(sdprune, tmp_path):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    Image.new("1", (10_000, 10_000)).save(root / "val2017" / "000000000014.jpg", format="PNG")
    line = told(sdprune, tmp_path / "runs", *coco(root))
    assert "000000000014.jpg is damaged" in line
    assert "decompression bomb" in line


def test_a_picture_that_is_a_program_is_not_run(sdprune, tmp_path):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    (root / "val2017" / "000000000014.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    assert "000000000014.jpg is damaged (cannot identify" in told(sdprune, tmp_path / "runs", *coco(root))


def coco(root, *options):
    return ["--data.source=CocoDirectory", f"--data.source.root={root}", "--data.source.split=val2017",
            "--data.n=3", *options]  # fmt: skip


# --- damage ----------------------------------------------------------------------------------------------------


def nested(depth):
    return "[" * depth + "]" * depth


def replaced_by_directory(path):
    path.unlink()
    path.mkdir()


def replaced_by_loop(path):
    path.unlink()
    path.symlink_to(path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1, 2]"),
    "deeply nested": lambda path: path.write_text('{"a": ' + nested(100_000) + "}"),
    "nested": lambda path: path.write_text('{"in_channels": ' + nested(900) + "}"),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "a directory": replaced_by_directory,
    "a loop": replaced_by_loop,
}
CONFIGS = ("unet/config.json", "text_encoder/config.json", "vae/config.json", "scheduler/scheduler_config.json",
           "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json", "model_index.json")  # fmt: skip


def refused(model):
    """What is said of a model before and while it is loaded."""

    def use(family):
        family.describe()
        family.check(Sampling(steps=2))
        family.load(torch.float32, torch.device("cpu"))

    with pytest.raises(InputError) as caught:
        use(StableDiffusion(str(model)))
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_configurations(model, name, damage):
    DAMAGE[damage](model / name)
    refused(model)


@pytest.mark.parametrize("damage", ["truncated", "a loop"])
def test_damaged_configurations_at_the_command_line(sdprune, model, tmp_path, damage):
    DAMAGE[damage](model / "unet" / "config.json")
    assert "unet/config.json is damaged" in told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")


VALUES = {
    "unet/config.json": [
        {"in_channels": "eight"}, {"block_out_channels": None}, {"cross_attention_dim": 7}, {"sample_size": -1},
        {"block_out_channels": [10**12, 160]}, {"layers_per_block": 10**9}, {"down_block_types": ["os.system"]},
        {"act_fn": {"a": 1}}, {"out_channels": 3}, {"block_out_channels": [960, 1600]}, {"attention_head_dim": 0},
    ],
    "text_encoder/config.json": [
        {"hidden_size": 191}, {"num_hidden_layers": 2**70}, {"num_hidden_layers": 999}, {"vocab_size": 7},
        {"hidden_act": "none"}, {"max_position_embeddings": 8}, {"num_hidden_layers": 5}, {"vocab_size": 2**20},
    ],
    "vae/config.json": [{"latent_channels": [8]}, {"norm_num_groups": 7}, {"out_channels": 1}],
    "scheduler/scheduler_config.json": [
        {"num_train_timesteps": 10**12}, {"beta_schedule": "no"}, {"num_train_timesteps": "x"}, {"trained_betas": 3},
        {"num_train_timesteps": 1}, {"timestep_spacing": 3},
    ],
    "tokenizer/tokenizer_config.json": [
        {"model_max_length": 10**30}, {"model_max_length": "x"}, {"model_max_length": -1}, {"pad_token": None},
        {"model_max_length": 77},
    ],
    "model_index.json": [
        {"unet": []}, {"unet": None}, {"unet": ["diffusers"]}, {"unet": [1, 2]}, {"unet": "diffusers"},
        {"scheduler": ["diffusers", "no"]}, {"_class_name": 3}, {"tokenizer": ["transformers", {}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "values"), [(name, values) for name, many in VALUES.items() for values in many])
def test_changed_values_of_configurations(model, name, values):
    change(model / name, **values)
    refused(model)


def test_weights_of_another_shape(model):
    for part in ("unet", "text_encoder", "vae"):
        (file,) = (model / part).glob("*.safetensors")
        state = load_file(file)
        key = max(state, key=lambda name: state[name].numel())
        save_file({**state, key: state[key].flatten()}, file, metadata={"format": "pt"})
        assert f"{model / part} cannot be read" in refused(model)
        save_file({**state, "extra.weight": state[key].clone()}, file, metadata={"format": "pt"})
        assert f"{model / part} has no place for 1 of its weights, such as 'extra.weight'" in refused(model)
        file.write_bytes(file.read_bytes()[:-100])
        assert re.search(rf"{file} is damaged \([^()]*\)\. Replace it with an intact copy\.$", refused(model))
        save_file(state, file, metadata={"format": "pt"})


TOKENIZERS = {
    "merges of unknown tokens": lambda model: model.update(merges=[["zz", "qq"]]),
    "merges that are no pairs": lambda model: model.update(merges=[["a"], 3]),
    "a vocabulary of texts": lambda model: model.update(vocab={"a": "b"}),
    "no vocabulary": lambda model: model.pop("vocab"),
    "numbers beyond the encoder's": lambda model: model["vocab"].update({"a": 10_000}),
    "another kind": lambda model: model.update(type="WordPiece"),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_damaged_tokenizers(model, damage):
    file = model / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    TOKENIZERS[damage](content["model"])
    file.write_text(json.dumps(content))
    refused(model)


def test_a_damaged_evaluator(tmp_path):
    folder = save_tiny_clip(tmp_path / "clip")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = load_file(folder / "model.safetensors")
    lost = "text_model.final_layer_norm.weight"

    def without_a_weight():
        save_file({k: v for k, v in state.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})

    damages = [
        without_a_weight,
        lambda: change(folder / "preprocessor_config.json", size={"shortest_edge": 10**9}),
        lambda: change(folder / "preprocessor_config.json", crop_size={"height": 31, "width": 31}),
        lambda: change(folder / "preprocessor_config.json", image_mean=[0.5]),
        lambda: change(folder / "config.json", text_config=3),
        lambda: change(folder / "vocab.json", **{"zz": 10**6}),
    ]
    for damage in damages:
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        damage()
        with pytest.raises(InputError, match=str(folder)) as caught:
            ClipImageFeatures(str(folder)).load("cpu")
        assert "\n" not in str(caught.value)


# --- captions and pictures -------------------------------------------------------------------------------------

CAPTIONS = {
    "not valid Unicode for 000000000007.jpg": lambda content: [
        annotation.update(caption="half \ud800") for annotation in content["annotations"] if annotation["image_id"] == 7
    ],
    "no 64-bit numbers: 9223372036854775808": lambda content: rename(content, 2**63),
    "no 64-bit numbers: '\\udfff'": lambda content: [
        rename(content, "\udfff", 7),
        rename(content, "b", 14),
        rename(content, "c", 21),
    ],
    "file names that cannot be written": lambda content: content["images"][1].update(file_name="\udc80.jpg"),
    "at most 245 bytes": lambda content: content["images"][1].update(file_name="x" * 242 + ".jpg"),
    "control characters": lambda content: content["images"][1].update(file_name="a\nb.jpg"),
    "1024 in all": lambda content: content["images"][1].update(file_name="d/" * 600 + "a.jpg"),
    "is damaged": lambda content: content.update(images=[{"id": []}]),
}


def rename(content, value, old=7):
    for image in content["images"]:
        image["id"] = value if image["id"] == old else image["id"]
    for annotation in content["annotations"]:
        annotation["image_id"] = value if annotation["image_id"] == old else annotation["image_id"]


@pytest.mark.parametrize("words", CAPTIONS)
def test_captions_that_cannot_be_used(sdprune, tmp_path, words):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    edit(root, CAPTIONS[words], "val2017")
    line = told(sdprune, tmp_path / "runs", *coco(root))
    assert words in line
    assert str(root) in line


def test_an_id_with_a_newline_stays_in_one_line(sdprune, tmp_path):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    edit(root, lambda content: content["annotations"][0].update(image_id="a\nb\x1b[31m"), "val2017")
    assert r"unknown image ids: a\nb\x1b[31m" in told(sdprune, tmp_path / "runs", *coco(root))


def test_the_longest_name_can_be_written(sdprune, tmp_path):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    name = "x" * 241 + ".jpg"
    (root / "val2017" / "000000000014.jpg").rename(root / "val2017" / name)
    edit(root, lambda content: content["images"][1].update(file_name=name), "val2017")
    assert sdprune(*predict(tmp_path / "runs", *coco(root))).code == 0
    assert len(list((tmp_path / "runs").glob(f"dense-*/images/{'x' * 241}.png"))) == 1


def test_deeply_nested_annotations(sdprune, tmp_path):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    (root / "annotations" / "captions_val2017.json").write_text('{"images": ' + nested(100_000) + "}")
    assert "is damaged" in told(sdprune, tmp_path / "runs", *coco(root))


@pytest.mark.parametrize("damage", ["loop", "directory", "empty"])
def test_pictures_that_are_none(sdprune, tmp_path, damage):
    root = write_coco(tmp_path / "coco", n=3, split="val2017")
    picture = root / "val2017" / "000000000014.jpg"
    {"loop": replaced_by_loop, "directory": replaced_by_directory, "empty": lambda path: path.write_bytes(b"")}[damage](
        picture
    )
    assert picture.name in told(sdprune, tmp_path / "runs", *coco(root))


@pytest.mark.parametrize("name", ["*.safetensors", "facts.json"])
def test_a_directory_in_the_place_of_statistics(sdprune, tmp_path, name):
    line = fit("calibrate", tmp_path, "--model.components=[unet]", "--model.statistics=[input_norm]")
    assert sdprune(*line).code == 0
    (file,) = (tmp_path / "statistics").glob(f"unet-*/{name}")
    content = file.read_bytes()
    replaced_by_directory(file)
    result = sdprune(*line)
    assert result.code == 2
    message = f"sdprune: error: {file} is a directory where a file belongs: remove it and run again."
    assert result.err.splitlines()[-1] == message
    assert not list(file.parent.glob(".*")), "no temporary file is left"
    file.rmdir()
    assert sdprune(*line).code == 0
    assert file.read_bytes() == content


def test_damaged_statistics(sdprune, tmp_path):
    good, file = tmp_path / "good.npz", tmp_path / "reference.npz"
    np.savez_compressed(good, mu=np.zeros(64), sigma=np.eye(64), n=np.array(9))
    whole = good.read_bytes()
    for position in range(0, len(whole), 7):  # each flip is told, or is where nothing reads
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        assert_statistics_or_line(file)
    for end in range(0, len(whole), 31):
        file.write_bytes(whole[:end])
        assert_statistics_or_line(file)
    file.write_bytes(whole[:200])
    assert "reference.npz is not a readable npz" in told(sdprune, tmp_path / "runs", f"--data.reference={file}")
    np.savez(file, mu=np.zeros(64), sigma=np.eye(64), n=np.array(np.inf))
    assert "reference.npz holds no statistics" in told(sdprune, tmp_path / "runs", f"--data.reference={file}")


def assert_statistics_or_line(file):
    with contextlib.suppress(InputError):
        found = Statistics.load(file)
        assert torch.equal(found.mu, torch.zeros(64, dtype=torch.float64))
        assert torch.equal(found.sigma, torch.eye(64, dtype=torch.float64))


# --- models of other families ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StableDiffusionXLPipeline", ", not a StableDiffusionPipeline: use --model.pipeline=StableDiffusionXL."),
        ("ZImagePipeline", ", not a StableDiffusionPipeline: use --model.pipeline=ZImage."),
        ("KandinskyPipeline", ", which is not supported. Choices: StableDiffusionPipeline, FluxPipeline, "),
    ],
)
def test_a_pipeline_of_another_family(sdprune, model, tmp_path, name, words):
    change(model / "model_index.json", _class_name=name, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    (model / "text_encoder_2").mkdir()
    line = told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")
    assert f"'{name}'{words}" in line


def test_a_model_for_inpainting(sdprune, model, tmp_path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = json.loads((model / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config, in_channels=17).save_pretrained(model / "unet")
    line = told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")
    assert "takes 17 channels and the VAE makes 8" in line
    assert "inpainting" in line


def test_a_scheduler_of_flow_matching(sdprune, model, tmp_path):
    line = told(sdprune, tmp_path / "runs", "--model.sampling.scheduler=FlowMatchEulerDiscreteScheduler")
    assert "FlowMatchEulerDiscreteScheduler is made for another family" in line
    change(model / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    line = told(sdprune, tmp_path / "runs", f"--model.pipeline.model={model}")
    assert "FlowMatchEulerDiscreteScheduler is made for another family" in line
    assert "DDIMScheduler" in line


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_checkpoint(sdprune, tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(b"weights")
    line = told(sdprune, tmp_path / "runs", f"--model.pipeline.model={file}")
    assert "is one file" in line
    assert "from_single_file" in line


def test_a_copy_without_the_safety_checker_says_so(sdprune, model, tmp_path):
    change(model / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
           feature_extractor=["transformers", "CLIPFeatureExtractor"])  # fmt: skip
    for name in ("safety_checker", "feature_extractor"):
        (model / name).mkdir()
    result = sdprune(*fit("prune", tmp_path / "runs", f"--model.pipeline.model={model}"))
    assert result.code == 0, result.err
    assert "Not saved" in result.out
    assert "feature_extractor, safety_checker" in result.out
    (card,) = (tmp_path / "runs").glob("pruned-*/README.md")
    assert "`feature_extractor`, `safety_checker`" in card.read_text()


def test_a_copy_of_a_model_without_one_says_nothing(sdprune, model, tmp_path):
    result = sdprune(*fit("prune", tmp_path / "runs", f"--model.pipeline.model={model}"))
    assert (result.code, result.err) == (0, "")
    assert "Not saved" not in result.out
    (card,) = (tmp_path / "runs").glob("pruned-*/README.md")
    assert "The original's" not in card.read_text()
