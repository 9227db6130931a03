"""What every family must do, on tiny pipelines with random weights; plain diffusers is the oracle."""

import json

import numpy as np
import pytest
import tiny_families
import torch
from command_lines import CONFIGS, CPU, the_run
from safetensors.torch import load_file

import sdprune.pipelines
from sdprune.errors import InputError
from sdprune.pipelines import DiffusersFamily, Sampling

PROMPTS = ["a red star", "two cats and a much longer caption than fits"]
SEEDS = [3, 4]


@pytest.fixture(scope="module", params=tiny_families.FAMILIES)
def family(request, tmp_path_factory):
    """(name, directory)"""
    return request.param, tiny_families.save(request.param, tmp_path_factory.mktemp(request.param))


def loaded(name, directory):
    model = getattr(sdprune.pipelines, name)(str(directory))
    model.check(Sampling(steps=2))
    model.load(torch.float32, torch.device("cpu"))
    return model


def small(verb, config, family, output, *options):
    name, directory = family
    pipeline = [f"--model.pipeline={name}", f"--model.pipeline.model={directory}", "--model.sampling.steps=2"]
    data = ["--data.source.images=20", "--data.calibration_n=3", "--data.calibration_batch_size=2", CPU]
    where = [f"--model.store={output}/statistics", f"--model.output={output}"]
    return [verb, "--config", CONFIGS / config, *pipeline, *data, *where, *options]


def each(name, option):
    return [f"--model.prune.{component}.{option}" for component in components_of(name)]


def components_of(name):
    return [part for part in getattr(sdprune.pipelines, name).parts if "text_encoder" in part or part == "unet"]


def test_every_family_is_tested_here():
    shipped = {cls.__name__ for cls in DiffusersFamily.__subclasses__() if cls.__module__.startswith("sdprune.")}
    assert shipped == tiny_families.FAMILIES.keys()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_are_those_of_plain_diffusers(family, guidance):
    from diffusers import DiffusionPipeline

    name, directory = family
    own = loaded(name, directory).generate(PROMPTS, SEEDS, Sampling(steps=3, guidance=guidance))
    plain = DiffusionPipeline.from_pretrained(directory, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    theirs = plain(
        PROMPTS, num_inference_steps=3, guidance_scale=guidance, generator=generators, output_type="np"
    ).images
    assert own.finite == [True, True]
    assert np.abs(own.images.permute(0, 2, 3, 1).numpy() - (theirs * 255).round()).max() <= 1


def test_a_component_runs_alone_on_what_generation_gives_it(family):
    """Its first inputs are those of a whole run; of text encoders those without guidance."""
    model = loaded(*family)
    seen = {}
    for component in model.prunable.values():

        def keep(module, args, kwargs, name=component.name):
            value = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(name, []).append(value.clone())

        handle = component.module.register_forward_pre_hook(keep, with_kwargs=True)
        component.run(PROMPTS, SEEDS, Sampling(steps=2))
        alone = seen.pop(component.name)
        model.generate(PROMPTS, SEEDS, Sampling(steps=2), decode=False)
        handle.remove()
        assert len(alone) == component.steps(Sampling(steps=2))
        assert torch.equal(alone[0], seen[component.name][0])
        tokens = component.tokens(PROMPTS)
        assert (tokens is None) == (component.role == "denoiser")
        if tokens is not None:
            assert tokens.shape == alone[0].shape
            assert tokens.sum(1).tolist() == [10, 16]  # eight letters, start and end; cut at the context


@pytest.mark.parametrize("order", ["one_pass", "sequential"])
def test_fit_prunes_every_component_to_the_weight(family, sdprune, tmp_path, order):
    from diffusers import DiffusionPipeline

    name, directory = family
    options = [*each(name, "sparsity=0.4"), *each(name, "criterion=Wanda"), *each(name, f"order={order}")]
    told = sdprune(*small("fit", "prune.yaml", family, tmp_path, *options))
    assert (told.code, told.err) == (0, "")
    (saved,) = tmp_path.glob("pruned-*")
    report = json.loads((saved / "pruning_report.json").read_text())
    for component in components_of(name):
        (file,) = (saved / component).glob("*.safetensors")
        pruned, dense = load_file(file), load_file(next((directory / component).glob("*.safetensors")))
        layers = {layer["name"]: layer for layer in report["layers"][component]}
        assert layers
        for layer, counts in layers.items():
            key = next(key for key in pruned if key.endswith(f"{layer}.weight"))
            zero = pruned[key] == 0
            assert int(zero.sum()) == counts["zeros"]
            assert counts["pruned"] == int(0.4 * zero.numel() + 0.5)
            assert torch.equal(pruned[key][~zero], dense[key][~zero].to(pruned[key].dtype))
    assert DiffusionPipeline.from_pretrained(saved, safety_checker=None) is not None


def test_a_budget_predict_and_report(family, sdprune, tmp_path):
    name, _ = family
    drawn = ["--data.n=4", "--data.batch_size=2", "--model.samples=[a red star]", "--model.budget.total=0.05"]
    drawn += ["--model.budget.counting=actual", "--model.budget.decimals=4", *each(name, "sparsity=0")]
    told = sdprune(*small("predict", "predict.yaml", family, tmp_path, *drawn))
    assert (told.code, told.err) == (0, "")
    results = json.loads((the_run(tmp_path, "text_encoder") / "results.json").read_text())
    assert results["sparsity"]["prunable"]["pruned_fraction"] == pytest.approx(0.05, abs=1e-4)
    text = [one for component, one in results["sparsity"]["components"].items() if "text" in component]
    pruned = sum(one["pruned"] for one in text)
    assert pruned == pytest.approx(results["sparsity"]["prunable"]["pruned"] / 2, rel=0.01)
    told = sdprune("report", tmp_path, f"--out={tmp_path / 'report'}")
    assert (told.code, told.err) == (0, "")
    table = (tmp_path / "report" / "tables" / "runs.csv").read_text()
    assert all(component in table for component in components_of(name) if component != "vae")


def test_a_measured_budget_reads_every_component_at_the_prediction(family, sdprune, tmp_path):
    name, _ = family
    unit = "{class_path: Sensitivity, init_args: {unit: block, levels: [0.3, 0.8], samples: 2, steps: 2}}"
    options = ["--model.budget.total=0.1", "--model.budget.split=sensitivity", *each(name, "sparsity=0")]
    told = sdprune(*small("fit", "prune.yaml", family, tmp_path, *options, *each(name, f"allocation={unit}")))
    assert (told.code, told.err) == (0, "")
    (saved,) = tmp_path.glob("pruned-*")
    report = json.loads((saved / "pruning_report.json").read_text())
    assert list(report["budget"]["sparsities"]) == components_of(name)
    whole = report["sparsity"]["prunable"]
    assert whole["pruned"] == int(0.1 * whole["parameters"] + 0.5)
    for component in components_of(name):
        measured = report["pruning"][component]["sensitivity"]
        assert measured["read_at"] == "prediction"
        unread = {unit["name"] for unit in measured["units"] if not any(unit["errors"])}
        # Of its first encoder Stable Diffusion XL reads the layer before the last one.
        last = name == "StableDiffusionXL" and component == "text_encoder"
        assert [one.rpartition(".")[2] for one in unread] == ["2"] * last


def test_another_familys_model_names_the_family(family, tmp_path):
    name, directory = family
    (other,) = tiny_families.FAMILIES.keys() - {name}
    with pytest.raises(InputError, match=rf"use --model\.pipeline={name}"):
        _ = getattr(sdprune.pipelines, other)(str(directory)).prunable
