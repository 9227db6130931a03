"""`sdprune lossless`: no picture changes by what it leaves out, what matters stays; plain diffusers is the oracle."""

import json
import shutil
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import torch
from command_lines import fit, predict
from safetensors.torch import load_file, save_file
from torch.nn import functional

import sdprune as package
from sdprune.__main__ import main
from sdprune.errors import InputError

PROMPTS = ["a red star", "two cats"]
SMALL = ["--size=32"]
GONE = {  # by hand, from the code of diffusers and transformers
    "StableDiffusion": ["vae.encoder", "vae.quant_conv"],
    "StableDiffusionXL": [
        "text_encoder.encoder.layers.2", "text_encoder.final_layer_norm", "vae.encoder", "vae.quant_conv",
    ],
    "StableDiffusion3": ["transformer.transformer_blocks.2.attn.add_q_proj", "vae.encoder"],
    "QwenImage": [
        "text_encoder.model.visual", "text_encoder.lm_head", "transformer.transformer_blocks.2.attn.add_q_proj",
        "transformer.transformer_blocks.2.attn.to_add_out", "transformer.transformer_blocks.2.txt_mlp", "vae.encoder",
        "vae.quant_conv", "vae.decoder.up_blocks.0.upsamplers.0.time_conv",
    ],
    "Flux": ["vae.encoder"],
    "ZImage": ["text_encoder.model.layers.2", "text_encoder.model.norm", "vae.encoder"],
}  # fmt: skip


@pytest.fixture(scope="module", params=GONE)
def copied(request, tmp_path_factory):
    """(name, directory, copy)"""
    directory = tiny_families.save(request.param, tmp_path_factory.mktemp(request.param) / "model")
    out = directory.parent / "out"
    assert main(["lossless", str(directory), "--out", str(out), *SMALL]) == 0
    return request.param, directory, out


def plain(directory):
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiffusionPipeline.from_pretrained(directory, safety_checker=None)
    for part in pipe.components.values():  # bits depend on where in memory weights lie, and a file puts them anywhere
        for one in part.parameters() if isinstance(part, torch.nn.Module) else ():
            one.data = one.data.clone()
    return pipe


def drawn(pipe, steps=2, prompts=PROMPTS):
    """Pictures in floating point, by the pipeline itself."""
    pipe.set_progress_bar_config(disable=True)
    call = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(
        list(prompts), num_inference_steps=steps, height=32, width=32, generator=generators, output_type="np", **call
    ).images


def tensors(directory):
    """By component and name, all that its safetensors hold."""
    files = directory.glob("*/*.safetensors")
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def test_the_pictures_are_the_same_to_the_bit(copied):
    _, directory, out = copied
    dense = drawn(plain(directory))
    assert np.array_equal(dense, drawn(package.load(out)))
    assert np.array_equal(dense, drawn(plain(out)))
    assert len(np.unique(dense)) > 20


def test_what_is_gone_is_what_the_table_says(copied, capsys):
    name, directory, out = copied
    before, after, facts = tensors(directory), tensors(out), json.loads((out / "lossless.json").read_text())
    assert sorted(f"{one['component']}.{one['module']}" for one in facts["removed"]) == sorted(GONE[name])
    assert all(value.equal(before[key]) and value.dtype == before[key].dtype for key, value in after.items())
    lost = {key: value for key, value in before.items() if key not in after}
    numbers = sum(value.numel() for value in lost.values())
    assert sum(one["parameters"] for one in facts["removed"]) == numbers
    assert sum(one["bytes"] for one in facts["removed"]) == 4 * numbers
    assert facts["parameters"]["before"] - facts["parameters"]["after"] == numbers
    sizes = [sum(path.stat().st_size for path in one.rglob("*") if path.is_file()) for one in (directory, out)]
    assert facts["bytes"]["before"] == sizes[0]
    assert 0 <= sizes[1] - facts["bytes"]["after"] == (out / "lossless.json").stat().st_size
    assert sizes[0] - sizes[1] > 3.5 * numbers - 10_000


def test_it_saves_itself_and_there_is_nothing_more_to_remove(copied, tmp_path, capfd):
    _, _, out = copied
    pipe = package.load(out)
    pipe.save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == tensors(out).keys()
    assert np.array_equal(drawn(pipe), drawn(package.load(tmp_path / "again")))
    assert main(["lossless", str(tmp_path / "again"), "--out", str(tmp_path / "twice"), *SMALL]) == 2
    assert "there is nothing to remove" in capfd.readouterr().err
    assert not (tmp_path / "twice").exists()


# --- what matters stays ---------------------------------------------------------------------------------------

OTHER = """
from sdprune.pipelines.stable_diffusion_xl import StableDiffusionXL


class Other(StableDiffusionXL):
    \"\"\"Reads the last hidden state.

    Args:
        model: a directory.
        revision: none.
        variant: none.
    \"\"\"

    {change}
"""


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_families.save("StableDiffusionXL", tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Makes a family of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, change):
        (tmp_path / f"{name}.py").write_text(OTHER.format(change=change))
        return f"--pipeline={name}.Other"

    return make


def test_a_layer_that_is_read_stays(sdprune, sdxl, tmp_path, other):
    """With clip_skip -1 the pipeline reads the hidden state behind the last layer."""
    words = [
        "lossless",
        sdxl,
        "--out",
        tmp_path / "out",
        *SMALL,
        other("reads_last", "call, idle = {'clip_skip': -1}, {}"),
    ]
    told = sdprune(*words)
    assert (told.code, told.err) == (0, ""), told.err
    facts = json.loads((tmp_path / "out" / "lossless.json").read_text())
    gone = [one["module"] for one in facts["removed"]]
    assert gone
    assert not any(one.startswith("encoder.layers") for one in gone)


def test_a_family_that_is_wrong_about_a_layer_is_found_out(sdprune, sdxl, tmp_path, other):
    wrong = other("wrong", 'idle = {"unet": ("mid_block.attentions.0.transformer_blocks.0.ff.net.2",)}')
    told = sdprune("lossless", sdxl, "--out", tmp_path / "out", *SMALL, wrong)
    assert told.code == 2
    assert "change with weights that no picture should depend on" in told.err
    assert "Nothing was written" in told.err
    assert not list(tmp_path.glob("*out*"))


def test_a_file_that_lacks_a_layer_that_matters_is_refused(sdxl, tmp_path):
    shutil.copytree(sdxl, tmp_path / "model")
    (file,) = (tmp_path / "model" / "text_encoder").glob("*.safetensors")
    for layer, refused in ((2, False), (1, True)):
        save_file({k: v for k, v in load_file(file).items() if f"layers.{layer}." not in k}, file, {"format": "pt"})
        if refused:
            with pytest.raises(InputError, match=r"text_encoder lacks 16 of its weights, such as 'encoder\.layers\.1"):
                package.load(tmp_path / "model")
        else:
            assert np.array_equal(drawn(package.load(tmp_path / "model")), drawn(plain(sdxl)))


def test_a_size_that_the_pipeline_does_not_draw(sdprune, sdxl, tmp_path, other):
    told = sdprune("lossless", sdxl, "--out", tmp_path / "out", "--size=24", other("coarse", "patch = 8"))
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--size is 24" in told.err
    assert "draws multiples of 16 pixels, such as 32" in told.err


def test_what_is_to_be_kept_stays(sdprune, sdxl, tmp_path):
    words = ["lossless", sdxl, "--out", tmp_path / "out", *SMALL, "--keep=vae", "--keep=text_encoder.*.2.mlp"]
    assert sdprune(*words).code == 0
    lost = tensors(sdxl).keys() - tensors(tmp_path / "out").keys()
    assert lost
    allowed = ("text_encoder/encoder.layers.2.*", "text_encoder/final_layer_norm.*")
    assert all(any(fnmatchcase(one, two) for two in allowed) and ".mlp." not in one for one in lost)


# --- tables ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["StableDiffusion", "QwenImage"])
def tabulated(request, tmp_path_factory):
    """(name, directory, a copy with tables for three steps)"""
    directory = tiny_families.save(request.param, tmp_path_factory.mktemp(f"t-{request.param}") / "model")
    out = directory.parent / "out"
    assert main(["lossless", str(directory), "--out", str(out), *SMALL, "--tables", "--steps=3"]) == 0
    return request.param, directory, out


def test_tables_give_the_same_pictures(tabulated):
    name, directory, out = tabulated
    dense, pipe = plain(directory), package.load(out)
    assert np.array_equal(drawn(dense, 3), drawn(pipe, 3))
    np.testing.assert_allclose(drawn(dense, 3, PROMPTS[:1]), drawn(pipe, 3, PROMPTS[:1]), atol=1e-4)
    facts = json.loads((out / "lossless.json").read_text())
    folder = "unet" if name == "StableDiffusion" else "transformer"
    before, after = (tensors(one) for one in (directory, out))
    layers = facts["tables"]["layers"]
    assert len(layers) == {"StableDiffusion": 10, "QwenImage": 9}[name]
    saved = 0
    for layer in layers:
        weight, bias = (before[f"{folder}/{layer}.{kind}"] for kind in ("weight", "bias"))
        table = after[f"{folder}/{layer}.weight"]
        assert table.shape == (3, len(weight))
        assert f"{folder}/{layer}.bias" not in after
        saved += weight.numel() + bias.numel() - table.numel()
    assert facts["tables"]["parameters"] == saved
    assert 0 <= facts["tables"]["rounding"] < 1e-4


def test_tables_refuse_other_steps_and_plain_diffusers(sdprune, tabulated, tmp_path):
    out = tabulated[2]
    with pytest.raises(InputError, match="made for 3 timesteps"):
        drawn(package.load(out), 4)
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|shape"):
        plain(out)
    told = sdprune("lossless", out, "--out", tmp_path / "twice", *SMALL, "--tables", "--steps=3")
    assert (told.code, "has tables already" in told.err) == (2, True)
    told = sdprune("lossless", out, "--out", tmp_path / "twice", *SMALL, "--steps=2")  # found before weights are read
    assert (told.code, "made for 3 timesteps" in told.err, told.err.count("\n")) == (2, True, 1)


# --- narrowed and reduced -------------------------------------------------------------------------------------


def narrowed(sdprune, family, directory, where, **shares):
    """A model narrowed by magnitude: no two of them differ by rounding."""
    choice = json.dumps({name: {"criterion": "Magnitude", "refit": False, **own} for name, own in shares.items()})
    words = [f"--model.pipeline={family}", f"--model.pipeline.model={directory}", "--model.prune={}"]
    words += ["--model.sampling.height=32", "--model.sampling.width=32", f"--model.narrow={choice}"]
    return sdprune(*fit("prune", where, *words, f"--model.directory={where / 'narrowed'}"))


UNITS = {"unet": {"heads": 0.5, "neurons": 0.3, "channels": 0.5}, "text_encoder": {"heads": 0.5}}


def test_a_narrowed_model_loses_what_no_picture_depends_on(sdprune, tmp_path):
    """Tables stand for layers that are narrowed too: the projections of the time."""
    dense = tiny_families.save("StableDiffusion", tmp_path / "dense")
    assert narrowed(sdprune, "StableDiffusion", dense, tmp_path, **UNITS).code == 0
    small, out = tmp_path / "narrowed", tmp_path / "out"
    told = sdprune("lossless", small, "--out", out, *SMALL, "--tables", "--steps=3")
    assert (told.code, told.err) == (0, "")
    assert np.array_equal(drawn(package.load(small), 3), drawn(package.load(out), 3))
    table = "unet/mid_block.resnets.0.time_emb_proj.weight"
    assert tensors(out)[table].shape == (3, 16)  # of 32 channels half are left
    told = narrowed(sdprune, "StableDiffusion", out, tmp_path / "again", unet={"heads": 0.5})
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--model.narrow.unet is given, and the unet of out has tables in place of layers" in told.err


def test_a_model_without_what_is_not_read_is_narrowed(sdprune, sdxl, tmp_path):
    """To the same pictures as the whole one."""
    assert sdprune("lossless", sdxl, "--out", tmp_path / "out", *SMALL).code == 0
    shares = {**UNITS, "text_encoder": {"heads": 0.5, "layers": 0.5}}
    for directory, name in ((sdxl, "whole"), (tmp_path / "out", "reduced")):
        told = narrowed(sdprune, "StableDiffusionXL", directory, tmp_path / name, **shares)
        assert (told.code, told.err) == (0, "")
    whole, reduced = (tmp_path / name / "narrowed" for name in ("whole", "reduced"))
    lost = tensors(whole).keys() - tensors(reduced).keys()
    assert {one.split("/")[0] for one in lost} == {"text_encoder", "vae"}
    assert np.array_equal(drawn(package.load(whole)), drawn(package.load(reduced)))


# --- text once ------------------------------------------------------------------------------------------------


def test_text_once_gives_the_same_bits_for_every_prompt(sdxl, monkeypatch):
    """And computes keys and values once a prompt: seen at the weight of one of these layers."""
    dense, once = plain(sdxl), package.load(sdxl, text_once=True)
    key = once.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    calls, linear = [], functional.linear

    def counted(inputs, weight, bias=None):
        calls.extend([1] if weight is key else [])
        return linear(inputs, weight, bias)

    monkeypatch.setattr(functional, "linear", counted)
    for number, prompts in enumerate((PROMPTS, PROMPTS[::-1], ["one"]), 1):
        assert np.array_equal(drawn(dense, 3, prompts), drawn(once, 3, prompts))
        assert len(calls) == number


# --- in every verb, and bad input -----------------------------------------------------------------------------


def test_the_copy_is_a_model_for_every_verb(sdprune, miniature, tmp_path):
    out = tmp_path / "out"
    assert sdprune("lossless", "miniature", "--out", out).code == 0
    pictures = []
    for model in ("miniature", out):
        runs = tmp_path / f"runs-{Path(model).name}"
        words = ["--model.prune={unet: {sparsity: 0.3, criterion: Magnitude}}", f"--model.pipeline.model={model}"]
        told = sdprune(*predict(runs, *words, "--data.n=2"))
        assert told.code == 0, told.err
        pictures.append(sorted(path.read_bytes() for path in runs.rglob("*.png")))
    assert pictures[0] == pictures[1]
    assert pictures[0]
    assert sdprune("pack", out, "--out", tmp_path / "packed").code == 0
    packed, loaded = (package.load(one).unet.state_dict() for one in (tmp_path / "packed", out))
    assert all(value.equal(loaded[name]) for name, value in packed.items())
    told = sdprune("lossless", tmp_path / "packed", "--out", tmp_path / "no")
    assert (told.code, "is packed: unpack it first" in told.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["MODEL"], "--out is missing"),
        (["nowhere/at/all", "--out=new"], "Model directory 'nowhere/at/all' does not exist"),
        (["EMPTY", "--out=new"], "is no diffusers directory"),
        (["MODEL", "--out=EMPTY/.."], "holds something: choose a new directory"),
        (["MODEL", "--out=MODEL/new"], "inside of"),
        (["MODEL", "--out=new", "--tables"], "--tables needs the number of denoising steps"),
        (["MODEL", "--out=new", "--keep=vae.encodr"], "Unknown module to --keep 'vae.encodr'. Did you mean"),
        (["MODEL", "--out=new", "--device=nothing"], "--device is 'nothing', which is not there"),
        (["MODEL", "--out=new", "--size=33"], "give a multiple of 8 pixels"),
        (["MODEL", "--out=new", "--scheduler=Foo"], "Unknown scheduler 'Foo'"),
        (["MODEL", "--out=new", "--kep=vae"], "Did you mean '--keep'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(sdprune, sdxl, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "EMPTY").mkdir(parents=True)
    places = {"MODEL": str(sdxl), "EMPTY": str(tmp_path / "full" / "EMPTY")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    told = sdprune("lossless", *words)
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert said in told.err
    assert not (tmp_path / "new").exists()


def test_space_is_looked_at_first(sdprune, sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    told = sdprune("lossless", sdxl, "--out", tmp_path / "out", *SMALL)
    assert (told.code, "GB free, and" in told.err) == (2, True)
    assert not list(tmp_path.iterdir())
