"""Whole layers are dropped: plain diffusers opens what is left, and it draws as if they had added nothing."""

import json
import warnings

import numpy as np
import pytest
import tiny_families
import torch
from command_lines import fit
from safetensors.torch import load_file

import sdprune as package
from sdprune.__main__ import main

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
        PROMPTS, num_inference_steps=2, height=32, width=32, generator=generators, output_type="np",
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
                written = [one for inner, one in layer.named_modules() if inner.endswith(WRITERS)]
                assert written
                for parameter in (each for one in written for each in one.parameters()):
                    torch.nn.init.zeros_(parameter)
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
        assert report["parameters"] == sum(one.numel() for file in files for one in load_file(file).values())
