"""Components that lie in the memory of the CPU while they do not compute; `beside` is the device where they do."""

import warnings
from dataclasses import replace
from importlib.util import find_spec

import beside
import pytest
import tiny_families
import torch
from command_lines import differences, everything
from test_families import FEW, GUIDED, PROMPTS, SEEDS, SMALL, components_of, each, interrupted, made, small

from sdprune.__main__ import main
from sdprune.errors import InputError
from sdprune.pipelines import Sampling

SAMPLING = Sampling(steps=2, guidance=GUIDED, **SMALL)
OFFLOADED = [*beside.TRAINER, "--model.pipeline.offload=true"]


@pytest.fixture(scope="module")
def device():
    if find_spec("accelerate") is None:
        pytest.skip("there is no accelerate: pip install '.[offload]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = beside.register()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as on a GPU
    yield made
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """By name, the directory of a family's tiny pipeline."""
    return {name: tiny_families.save(name, tmp_path_factory.mktemp(name)) for name in tiny_families.FAMILIES}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_one_component_at_a_time_lies_where_it_computes_and_pictures_are_the_same(name, directories, device):
    dense = made(name, directories[name])
    dense.load(torch.float32, torch.device("cpu"))
    wanted = dense.generate(PROMPTS, SEEDS, SAMPLING).images
    model, seen = made(name, directories[name]), set()
    model.placement.offload = True
    model.load(torch.float32, device)

    def there():
        return [part for part, one in model.components.items() if next(one.parameters()).device == device]

    for part, component in model.components.items():
        for inner in component.modules():
            if not any(inner.children()):
                inner.register_forward_pre_hook(lambda *_, part=part: seen.add((part, *there())))
    for _ in range(2):
        with torch.inference_mode():  # as in the predict loop
            assert torch.equal(model.generate(PROMPTS, SEEDS, SAMPLING).images, wanted)
        assert there() == []
    for part, component in model.prunable.items():
        with pytest.raises(StoppedError):
            model.prunable[model.denoiser].run(PROMPTS, SEEDS, SAMPLING, stop)
        assert there() == [model.denoiser]
        component.run(PROMPTS, SEEDS, replace(SAMPLING, guidance=1.0))  # guided, encoders run in turn
        assert model.bring(part) is component.module
        assert there() == [part]
    assert {part for part, *_ in seen} == {*model.prunable, "vae"}
    text = {part for part, component in model.prunable.items() if component.role == "text"}
    for part, *others in seen:  # prompts without guidance find the encoders where those with it left them
        assert others == [part] or {part, *others} <= text


def stop(step):
    if step == 1:
        raise StoppedError


def both(words, tmp_path):
    """What a command leaves on the CPU, and what it leaves where components are offloaded."""
    found = []
    for output, options in ((tmp_path / "cpu", []), (tmp_path / "beside", OFFLOADED)):
        assert main([word.replace("OUTPUT", str(output)) for word in [*words, *options]]) == 0
        left = everything(output)
        named = {path: value.replace("beside", "cpu") for path, value in left.items() if isinstance(value, str)}
        found.append(left | named)  # results say where they were made
    assert any(path.suffix == ".safetensors" for path in found[0])
    return found


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_what_is_calibrated_and_pruned_is_the_same(name, directories, device, miniature, tmp_path):
    words = small("fit", "prune.yaml", (name, directories[name]), "OUTPUT", *each(name, "criterion=SparseGPT"))
    words += [*each(name, "sparsity=0.4"), f"--model.prune.{components_of(name)[-1]}.order=sequential"]
    cpu, offloaded = both(words, tmp_path)
    assert differences(cpu, offloaded) == []


MEASURED = "{unit: block, levels: [0.3, 0.7], samples: 2}"
WAYS = {
    "drawn": ("PixArtSigma", ["--model.prune.transformer={sparsity: 0.5, criterion: Wanda}", *FEW]),
    "interrupted": ("PixArtSigma", ["--model.prune.transformer={sparsity: 0.5, criterion: SparseGPT}"]),
    "block by block": (
        "PixArtSigma",
        [
            "--model.prune.transformer={sparsity: 0.5, criterion: SparseGPT, order: sequential}",
            "--model.calibration.latents=dense", "--model.calibration.hessian_gib=0.0005",
        ],
    ),
    "measured": (
        "PixArtSigma",
        [
            "--model.budget={total: 0.1, split: sensitivity}",
            *each("PixArtSigma", f"allocation={{class_path: Sensitivity, init_args: {MEASURED}}}"),
        ],
    ),
    "narrowed": ("StableDiffusion", ["--model.narrow.unet={flops: 0.05, include: ['mid_block*']}"]),
}  # fmt: skip
"""By what is done, a family and options."""


@pytest.mark.parametrize("way", WAYS)
def test_every_way_comes_to_the_same(way, directories, device, miniature, tmp_path):
    name, options = WAYS[way]
    verb = ("predict", "predict.yaml") if way == "drawn" else ("fit", "prune.yaml")
    words = small(*verb, (name, directories[name]), "OUTPUT", *options)
    if way == "interrupted":
        here = [word.replace("OUTPUT", str(tmp_path / "beside")) for word in [*words, *OFFLOADED]]
        assert interrupted(here, 1) == 130
        assert list((tmp_path / "beside").glob("statistics/progress-*"))
    cpu, offloaded = both(words, tmp_path)
    assert differences(cpu, offloaded) == []


def test_on_the_cpu_there_is_nothing_to_offload(sdprune, directories, tmp_path):
    told = sdprune(
        *small("fit", "prune.yaml", ("Flux", directories["Flux"]), tmp_path, "--model.pipeline.offload=true")
    )
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--model.pipeline.offload is true, and this run computes on the CPU" in told.err
    assert "--trainer.accelerator=gpu" in told.err
    assert not list(tmp_path.iterdir())


def test_what_offloads_is_named_where_it_is_missing(directories, monkeypatch):
    monkeypatch.setattr("sdprune.pipelines.placement.find_spec", lambda name: None)
    model = made("Flux", directories["Flux"])
    model.placement.offload = True
    with pytest.raises(InputError, match=r'offload needs accelerate: pip install "sdprune\[offload\]"\.'):
        model.load(torch.float32, torch.device("cuda"))
