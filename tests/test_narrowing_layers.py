"""Whole layers are dropped: plain diffusers opens what is left, and it draws as if they had added nothing."""

import json
import warnings
from copy import deepcopy

import numpy as np
import pytest
import tiny_families
import torch
from command_lines import fit, predict, the_run
from narrowing import calls, output, pictures, small_text_encoder, small_unet
from safetensors.torch import load_file

import sdprune as package
from sdprune.__main__ import main
from sdprune.errors import InputError
from sdprune.mini.models import build_unet

PROMPTS = ["a red star", "two cats"]
BUILDERS = {
    **tiny_families.FAMILIES, **{f"{name} of another kind": one for name, one in tiny_families.VARIANTS.items()},
}  # fmt: skip
DROPPED = {  # how many go: half of those that can
    "StableDiffusion": {"text_encoder": 1, "unet": 2},
    "StableDiffusionXL": {"text_encoder": 1, "text_encoder_2": 1, "unet": 2},
    "StableDiffusion3": {"text_encoder": 1, "text_encoder_2": 1, "transformer": 1},
    "PixArtSigma": {"transformer": 2},
    "Flux": {"text_encoder": 1, "transformer": 3},
    "Sana": {"text_encoder": 1, "transformer": 1},
    "QwenImage": {"text_encoder": 1, "transformer": 2},
    "ZImage": {"text_encoder": 1, "transformer": 2},
}
LISTS = ("layers", "block", "transformer_blocks", "single_transformer_blocks")
WRITERS = (  # by hand, from the code: the layers of a layer that add to the residual stream
    "out_proj", "fc2", "o_proj", "down_proj", "to_out.0", "to_add_out", "net.2", "proj_out", "conv_point", "w2",
)  # fmt: skip
CALLS = {"PixArtSigma": {"use_resolution_binning": False}, "Sana": {"use_resolution_binning": False}}


@pytest.fixture(scope="module", params=BUILDERS)
def dropped(request, tmp_path_factory):
    """(family, the dense directory, that of the model whose layers are dropped)"""
    directory = tiny_families.save(request.param, tmp_path_factory.mktemp("tiny") / "model", BUILDERS)
    family, saved = request.param.partition(" ")[0], directory.parent / "saved"
    narrow = json.dumps({name: {"layers": 0.5} for name in DROPPED[family]})
    where = [f"--model.pipeline={family}", f"--model.pipeline.model={directory}", "--model.prune={}"]
    small = ["--model.sampling.height=32", "--model.sampling.width=32", f"--model.narrow={narrow}"]
    assert main(fit("prune", directory.parent, *where, *small, f"--model.directory={saved}")) == 0
    return family, directory, saved


def plain(directory):
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = DiffusionPipeline.from_pretrained(directory, safety_checker=None)
    for part in pipe.components.values():  # bits depend on where in memory weights lie, and a file puts them anywhere
        for one in part.parameters() if isinstance(part, torch.nn.Module) else ():
            one.data = one.data.clone()
    return pipe


def drawn(family, pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(
        list(PROMPTS), num_inference_steps=2, height=32, width=32, generator=generators, output_type="np",
        **CALLS.get(family, {}),
    ).images  # fmt: skip


def stacks(component):
    """The lists of layers, by name."""
    return {name: one for name, one in component.named_modules() if name.rpartition(".")[2] in LISTS}


def places(stack, dense):
    """Which layers of the dense stack these are: the same tensors, in the same order."""
    weights = [dict(layer.named_parameters()) for layer in dense]
    found = []
    for layer in stack:
        own = dict(layer.named_parameters())
        (place,) = (
            number for number, one in enumerate(weights)
            if one.keys() == own.keys() and all(torch.equal(own[name], value) for name, value in one.items())
        )  # fmt: skip
        found.append(place)
    assert found == sorted(found)
    return found


def silence(layer):
    """Let a layer add nothing to the residual stream."""
    written = [one for name, one in layer.named_modules() if name.endswith(WRITERS)]
    assert written
    for parameter in (each for one in written for each in one.parameters()):
        torch.nn.init.zeros_(parameter)


def test_plain_diffusers_opens_it_and_it_draws_as_if_they_added_nothing(dropped):
    family, directory, saved = dropped
    dense, small = plain(directory), plain(saved)
    assert len(np.unique(drawn(family, dense))) > 20
    gone = {}
    for name in DROPPED[family]:
        wide = stacks(getattr(dense, name))
        for path, stack in stacks(getattr(small, name)).items():
            left = places(stack, wide[path])
            absent = [layer for number, layer in enumerate(wide[path]) if number not in left]
            gone[name] = gone.get(name, 0) + len(absent)
            for layer in absent:
                silence(layer)
    assert gone == DROPPED[family]
    pictures = drawn(family, small)
    np.testing.assert_allclose(pictures, drawn(family, dense), atol=1e-5)
    assert np.array_equal(pictures, drawn(family, package.load(saved)))


def test_the_card_says_how_it_is_opened(dropped):
    card = (dropped[2] / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained(" in card
    for name, number in DROPPED[dropped[0]].items():
        assert f"- `{name}`, narrowed: " in card
        report = json.loads((dropped[2] / "pruning_report.json").read_text())["narrowing"][name]
        layers = [one for one in report["groups"] if one["kind"] == "layers"]
        assert sum(1 - one["kept"] for one in layers) == number
        files = list((dropped[2] / name).glob("*.safetensors"))
        stored = {name: one for file in files for name, one in load_file(file).items()}
        stored.pop("pos_embed.pos_embed", None)  # a buffer of SD3
        assert report["parameters"] == sum(one.numel() for one in stored.values())


# --- which of them go -----------------------------------------------------------------------------------------

OF_UNET = [
    f"{attention}.transformer_blocks.0"
    for attention in ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
                      "mid_block.attentions.0")
]  # fmt: skip
OF_TEXT = [f"encoder.layers.{number}" for number in range(5)]  # of 6: the last stays


def deep_text_encoder():
    return small_text_encoder(num_hidden_layers=6)


@pytest.mark.parametrize(("make", "names", "number"), [(small_unet, OF_UNET, 2), (deep_text_encoder, OF_TEXT, 3)])
def test_those_go_without_which_outputs_change_least(make, names, number):
    dense, small = make(), make()
    inputs = calls(dense)
    report = package.narrow(small, layers=0.5, inputs=inputs)
    outputs, errors = torch.cat([output(dense, call) for call in inputs]).flatten(1), {}
    for name in names:
        silent = deepcopy(dense)
        silence(silent.get_submodule(name))
        found = torch.cat([output(silent, call) for call in inputs]).flatten(1)
        errors[name] = float(((found - outputs).square().sum(1) / outputs.square().sum(1)).mean())
    assert [(one.name, one.kind, one.units) for one in report.groups] == [(name, "layers", 1) for name in names]
    gone = {one.name for one in report.groups if not one.kept}
    assert gone == set(sorted(errors, key=errors.__getitem__)[:number])
    for name in gone:
        silence(dense.get_submodule(name))
    for call in inputs:
        assert torch.allclose(output(small, call), output(dense, call), atol=1e-5)
    assert report.parameters == sum(one.numel() for one in small.parameters()) < report.parameters_before


def test_the_first_layer_of_t5_stays(tmp_path):
    """It makes the biases of positions for all others."""
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    config = tiny_families.t5()[0].config
    config.num_layers = 5
    model = T5EncoderModel(config).eval()
    inputs = [{"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))}]
    report = package.narrow(model, layers=1.0, inputs=inputs)
    assert [(one.name, one.kept) for one in report.groups] == [(f"encoder.block.{number}", 0) for number in (1, 2, 3)]
    model.save_pretrained(tmp_path)
    again, found = T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(output(again.eval(), inputs[0]), output(model, inputs[0]))


@pytest.mark.parametrize("make", [lambda: tiny_families.stable_diffusion_xl().unet, build_unet, small_unet])
@pytest.mark.parametrize("one", [True, False])
def test_the_configuration_of_a_unet_says_which_are_left(make, one):
    """Whatever is dropped, one by one or all: what diffusers makes of the configuration has the same tensors."""
    torch.manual_seed(0)
    dense = make()
    width = dense.config.cross_attention_dim
    call = {"sample": torch.randn(1, dense.config.in_channels, 8, 8), "timestep": torch.tensor(1)}
    call["encoder_hidden_states"] = torch.randn(1, 4, width)
    if dense.config.addition_embed_type:
        call["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 12), "time_ids": torch.zeros(1, 6)}
    names = [name for name, _ in dense.named_modules() if name.rpartition(".")[0].endswith("transformer_blocks")]
    last = len(dense.down_blocks) - 1
    if hasattr(dense.down_blocks[last], "attentions"):  # one option counts the layers of these two
        tied = (f"down_blocks.{last}.attentions.0.", "mid_block.")
        names = [name for name in names if not name.startswith(tied)]
    for chosen in [[name] for name in names] if one else [["*"]]:
        small = deepcopy(dense)
        report = package.narrow(small, layers=1.0, include=chosen, inputs=[call])
        assert sorted(each.name for each in report.groups) == sorted(names if chosen == ["*"] else chosen)
        again = type(dense).from_config(json.loads(small.to_json_string()))
        shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (small, again)]
        assert shapes[0] == shapes[1]
        assert len(shapes[0]) < len(dense.state_dict())


@pytest.mark.parametrize("refit", [False, True])
def test_layers_and_heads_together(refit):
    """Layers that stay are narrowed as they are where none is dropped."""
    both, heads = deep_text_encoder(), deep_text_encoder()
    inputs, options = calls(both), {"heads": 0.5, "criterion": "Magnitude", "refit": refit}
    report = package.narrow(both, layers=0.4, inputs=inputs, **options)
    package.narrow(heads, inputs=inputs, **options)
    gone = [int(one.name.rpartition(".")[2]) for one in report.groups if one.kind == "layers" and not one.kept]
    assert len(gone) == 2
    left = [layer for number, layer in enumerate(heads.encoder.layers) if number not in gone]
    assert len(both.encoder.layers) == len(left) == both.config.num_hidden_layers == 4
    for one, other in zip(both.encoder.layers, left, strict=True):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    kept = {one.name: one.kept for one in report.groups if one.kind == "heads"}
    assert kept == {f"encoder.layers.{number}.self_attn": 0 if number in gone else 2 for number in range(6)}


# --- by the command line --------------------------------------------------------------------------------------

LAYERS = "--model.narrow={unet: {layers: 0.4}, text_encoder: {layers: 0.6, heads: 0.3, refit: false}}"


def test_predict_and_fit_drop_the_same_layers(sdprune, miniature, tmp_path):
    """And what is left is pruned under its new names."""
    where = ["--model.prune={text_encoder: {sparsity: 0.5, criterion: Wanda}}", LAYERS]
    told = sdprune(*predict(tmp_path / "memory", *where))
    assert (told.code, told.err) == (0, "")
    record = the_run(tmp_path / "memory", "text_encoder-narrow-heads0.3-layers0.6-sparsegpt-plain-unet")
    saved = tmp_path / "saved"
    told = sdprune(*fit("prune", tmp_path, *where, f"--model.directory={saved}", "--data.source.split=train"))
    assert (told.code, told.err) == (0, "")
    layers = json.loads((saved / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    report = json.loads((saved / "pruning_report.json").read_text())
    assert {one["name"].split(".")[2] for one in report["layers"]["text_encoder"]} == set(map(str, range(layers)))
    found = json.loads((record / "results.json").read_text())["narrowing"]
    assert found["text_encoder"]["kinds"]["layers"]["kept"] == layers - 1
    assert "sdprune.load(" in (saved / "README.md").read_text()  # heads are gone too
    again = ["--model.prune={}", f"--model.pipeline.model={saved}", "--model.baseline=miniature"]
    told = sdprune(*predict(tmp_path / "again", *again))
    assert (told.code, told.err) == (0, "")
    assert pictures(the_run(tmp_path / "again", "saved")) == pictures(record)
    assert len(pictures(record)) == 7


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model.narrow.unet.layers=1.5"], "--model.narrow.unet.layers is 1.5: give a share between 0 and 1"),
        (["--model.narrow.unet={layers: 0.2, flops: 0.1}"], "decides the shares of all kinds, and layers is 0.2"),
        (
            ["--model.narrow.text_encoder={layers: 0.2, include: ['encoder.layer.*']}"],
            "include pattern 'encoder.layer.*' matches none of the 1 modules that can be narrowed so",
        ),
        (
            ["--model.narrow.text_encoder.layers=0.2", "--model.budget.total=0.3", "--model.prune={}"],
            "--model.narrow.text_encoder.layers leaves the number of weights to measurement",
        ),
        (
            ["--model.narrow.unet.layers=0.2", "--model.prune={unet: {sparsity: 0.3, exclude: ['mid_block*']}}"],
            "--model.narrow.unet.layers numbers layers anew, and --model.prune.unet chooses layers by name",
        ),
    ],
)
def test_what_cannot_be_dropped_is_explained(sdprune, miniature, tmp_path, options, line):
    told = sdprune(*predict(tmp_path, *options))
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert line in told.err


def test_a_module_without_layers_of_its_own_has_none_to_drop():
    with pytest.raises(InputError, match=r"layers is 0.5, and a Linear has no layers: it has nothing"):
        package.narrow(torch.nn.Linear(2, 2), layers=0.5, inputs=[torch.zeros(1, 2)])
