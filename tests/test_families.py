"""What every family must do, on tiny pipelines with random weights; plain diffusers is the oracle."""

import fnmatch
import inspect
import json
import warnings
import weakref
from pathlib import Path

import numpy as np
import pandas
import pytest
import tiny_families
import torch
import yaml
from command_lines import CONFIGS, CPU, differences, everything, process, the_run
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from safetensors.torch import load_file

import sdprune.pipelines
from sdprune.__main__ import main
from sdprune.calibration.collect import Collector
from sdprune.calibration.settings import Calibration
from sdprune.data import CocoDataModule, TextFile
from sdprune.errors import InputError
from sdprune.mini.source import EmbeddedWorld
from sdprune.modules import CalibrationModule, PruningModule
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pipelines.directory import ModelDirectory
from sdprune.pipelines.sampling import image_seed
from sdprune.pruning import Budget, PruneSpec
from sdprune.pruning.allocation.sensitivity import Sensitivity

PROMPTS = ["a red star", "two cats and a much longer caption than fits"]
SEEDS = [3, 4]
SIDE = 32
SMALL = {"height": SIDE, "width": SIDE}
GUIDED = 4.0
OWN_SIZE = {"use_resolution_binning": False}
CALLS = {  # what plain diffusers is called with to draw by a guidance scale
    "PixArtSigma": lambda scale: {"guidance_scale": scale, "clean_caption": False, **OWN_SIZE},
    "Sana": lambda scale: {"guidance_scale": scale, **OWN_SIZE},
    "QwenImage": lambda scale: {"true_cfg_scale": scale, **({"negative_prompt": " "} if scale > 1 else {})},
    "ZImage": lambda scale: {"guidance_scale": scale - 1},
}
TOKENS = {  # of the prompts, special ones included, that are no padding; templates and instructions are tokens too
    "StableDiffusion": {"text_encoder": [10, 16]},  # eight letters, start and end; cut at the context
    "StableDiffusionXL": {"text_encoder": [10, 16], "text_encoder_2": [10, 16]},
    "StableDiffusion3": {"text_encoder": [10, 16], "text_encoder_2": [10, 16], "text_encoder_3": [12, 46]},
    "PixArtSigma": {"text_encoder": [12, 46]},
    "Flux": {"text_encoder": [10, 16], "text_encoder_2": [12, 46]},
}


def saved(name, tmp_path_factory, builders=tiny_families.FAMILIES):
    return name, tiny_families.save(name, tmp_path_factory.mktemp(name), builders)


@pytest.fixture(scope="module", params=tiny_families.FAMILIES)
def family(request, tmp_path_factory):
    """(name, directory)"""
    return saved(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=tiny_families.VARIANTS)
def variant(request, tmp_path_factory):
    """(name, directory) of another model of a family"""
    return saved(request.param, tmp_path_factory, tiny_families.VARIANTS)


def made(name, directory):
    return getattr(sdprune.pipelines, name)(str(directory))


def loaded(name, directory):
    model = made(name, directory)
    model.check(Sampling(steps=2, **SMALL))
    model.load(torch.float32, torch.device("cpu"))
    return model


def plain(directory):
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiffusionPipeline.from_pretrained(directory, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_plainly(name, pipe, steps, guidance, prompts=PROMPTS, seeds=SEEDS):
    """Pictures of plain diffusers in grey levels, from the noise that its own generators draw."""
    call = CALLS.get(name, lambda scale: {"guidance_scale": scale})(guidance)
    if "negative_prompt" in call:
        call["negative_prompt"] = [" "] * len(prompts)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipe(
        list(prompts), num_inference_steps=steps, generator=generators, output_type="np", **SMALL, **call
    ).images
    return (images * 255).round()


def differ(drawn, theirs):
    assert drawn.finite == [True, True]
    return np.abs(drawn.images.permute(0, 2, 3, 1).numpy() - theirs).max()


def components_of(name):
    return [part for part in getattr(sdprune.pipelines, name).parts if part.startswith(("text_enc", "unet", "trans"))]


def test_every_family_is_tested_here():
    shipped = {cls.__name__ for cls in DiffusersFamily.__subclasses__() if cls.__module__.startswith("sdprune.")}
    assert shipped == tiny_families.FAMILIES.keys()


# --- what is drawn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, GUIDED])
def test_pictures_are_those_of_plain_diffusers(family, guidance):
    drawn = loaded(*family).generate(PROMPTS, SEEDS, Sampling(steps=3, guidance=guidance, **SMALL))
    assert differ(drawn, drawn_plainly(family[0], plain(family[1]), 3, guidance)) <= 1
    assert len(drawn.images.unique()) > 20


def test_pictures_of_another_model_of_the_family(variant):
    drawn = loaded(*variant).generate(PROMPTS, SEEDS, Sampling(steps=3, guidance=GUIDED, **SMALL))
    assert differ(drawn, drawn_plainly(variant[0], plain(variant[1]), 3, GUIDED)) <= 1


def test_guidance_changes_what_is_drawn(family):
    model = loaded(*family)
    off, on = (latents(model, Sampling(2, guidance, **SMALL)) for guidance in (1.0, GUIDED))
    assert off.shape == on.shape
    assert not torch.equal(off, on)


def latents(model, sampling):
    return model.generate(PROMPTS, SEEDS, sampling, decode=False).images


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler", "Foo"])
def test_a_scheduler_fits_or_is_refused_before_anything_is_loaded(family, scheduler):
    name, directory = family
    model, sampling = made(name, directory), Sampling(steps=3, scheduler=scheduler, **SMALL)
    flow = name not in ("StableDiffusion", "StableDiffusionXL", "PixArtSigma")
    fits = {"Foo": False, "FlowMatchHeunDiscreteScheduler": name == "StableDiffusion3"}
    if fits.get(scheduler, not flow or name == "Sana"):
        model.check(sampling)
        model.load(torch.float32, torch.device("cpu"))
        assert model.generate(PROMPTS, SEEDS, sampling).finite == [True, True]
        return
    with pytest.raises(InputError, match=rf"cheduler '?{scheduler}.* Choices: .*Scheduler"):
        model.check(sampling)


def test_schedulers_of_two_kinds_have_one_shift(tmp_path_factory):
    """Sana's own scheduler calls it `flow_shift`, the one of flow matching `shift`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    family = saved("Sana", tmp_path_factory)
    sampling = Sampling(3, GUIDED, scheduler="FlowMatchEulerDiscreteScheduler", **SMALL)
    pipe = plain(family[1])
    assert pipe.scheduler.config.flow_shift == 3.0
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert differ(loaded(*family).generate(PROMPTS, SEEDS, sampling), drawn_plainly("Sana", pipe, 3, GUIDED)) <= 1


def test_a_size_that_cannot_be_drawn_names_one_that_can(family):
    name, directory = family
    # All of these VAEs halve the side, but Qwen's, which quarters it; most denoisers read latents two by two.
    multiple = {"StableDiffusion": 2, "StableDiffusionXL": 2, "Sana": 2, "QwenImage": 8}.get(name, 4)
    model = made(name, directory)
    assert multiple in {8, model.patch * 2}
    if multiple > 2:
        with pytest.raises(InputError, match=rf"width is 42: .* multiples of {multiple} pixels, such as 40"):
            model.draw(plain(directory), None, PROMPTS, SEEDS, _sides(SIDE, 42), "pt")


class StoppedError(Exception):
    pass


def test_a_picture_without_a_size_is_as_large_as_the_pipelines_own(family):
    name, directory = family
    model, pipe, seen = made(name, directory), plain(directory), []
    prepare, pipe.vae_scale_factor = pipe.prepare_latents, 8  # of real VAEs
    if name == "Sana":  # its pipeline has pixels as default, which fit the real sizes alone
        pipe.vae_scale_factor = 32
        pipe.transformer.register_to_config(
            sample_size=inspect.signature(type(pipe.transformer)).parameters["sample_size"].default
        )

    def stop(*args, **kwargs):
        values = inspect.signature(prepare).bind(*args, **kwargs).arguments
        seen.append((values["height"], values["width"]))
        raise StoppedError

    pipe.prepare_latents = stop
    with pytest.raises(StoppedError):
        pipe(PROMPTS[:1], **OWN_SIZE if "use_resolution_binning" in model.call else {})
    with pytest.raises(StoppedError):
        model.draw(pipe, pipe.scheduler, PROMPTS[:1], SEEDS[:1], Sampling(), "latent")
    assert seen[0] == seen[1]
    assert min(seen[0]) >= 64


def test_a_model_of_pictures_that_are_no_squares(tmp_path_factory):
    name, directory = saved("StableDiffusion", tmp_path_factory)
    config = directory / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [8, 12]}))
    theirs = plain(directory)(PROMPTS[:1], num_inference_steps=2, output_type="np").images
    model = made(name, directory)
    model.check(Sampling(steps=2))
    model.load(torch.float32, torch.device("cpu"))
    assert model.generate(PROMPTS[:1], SEEDS[:1], Sampling(steps=2)).images.shape[2:] == theirs.shape[1:3] == (16, 24)


def _sides(height, width):
    sampling = Sampling(steps=2, height=height)
    object.__setattr__(sampling, "width", width)  # no multiple of 8, which tiny pipelines can draw
    return sampling


# --- loading --------------------------------------------------------------------------------------------------


def test_altered_weights_are_released_before_they_are_read_again(family, monkeypatch):
    model, sampling, read = loaded(*family), Sampling(2, GUIDED, **SMALL), ModelDirectory.load
    dense = latents(model, sampling)
    parts = [weakref.ref(one) for one in model.components.values()]
    for parameter in model.components[model.denoiser].parameters():
        parameter.data.zero_()
    model.altered = True

    def interrupted(self, name, dtype):
        assert [one for one in parts if one() is not None] == []
        if name == "vae":
            raise KeyboardInterrupt
        return read(self, name, dtype)

    monkeypatch.setattr(ModelDirectory, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.load(torch.float32, torch.device("cpu"))
    monkeypatch.undo()
    model.load(torch.float32, torch.device("cpu"))
    assert torch.equal(latents(model, sampling), dense)


# --- components -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, GUIDED])
def test_a_component_runs_alone_on_what_generation_gives_it(family, guidance):
    """Its inputs are those of a whole run, call by call."""
    model = loaded(*family)
    seen = {}
    sampling = Sampling(steps=2, guidance=guidance, **SMALL)
    for component in model.prunable.values():

        def keep(module, args, kwargs, name=component.name):
            values = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            seen.setdefault(name, []).append([one.clone() for one in flat(values)])

        handle = component.module.register_forward_pre_hook(keep, with_kwargs=True)
        component.run(PROMPTS, SEEDS, sampling)
        alone = seen.pop(component.name)
        model.generate(PROMPTS, SEEDS, sampling, decode=False)
        handle.remove()
        whole = seen[component.name]
        assert 0 < len(alone) == len(whole) <= component.calls(sampling)
        if component.role == "denoiser":
            assert len(alone) == 2 * (2 if family[0] == "QwenImage" and guidance > 1 else 1)
        for one, other in zip(alone, whole, strict=True):
            assert one
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def flat(values):
    for one in values.values():
        yield from (x for x in (one if isinstance(one, list) else [one]) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("guidance", [1.0, GUIDED])
def test_embeddings_are_all_that_the_denoiser_reads_of_a_step(family, guidance):
    """With those of the empty or negative prompts where it is guided by them."""
    name, directory = family
    model, read = loaded(name, directory), []

    def keep(module, args, kwargs):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        read.extend(given["cap_feats" if name == "ZImage" else "encoder_hidden_states"])

    handle = model.components[model.denoiser].register_forward_pre_hook(keep, with_kwargs=True)
    model.generate(PROMPTS, SEEDS, Sampling(steps=1, guidance=guidance, **SMALL), decode=False)
    handle.remove()
    assert len(read) == len(PROMPTS) * (2 if guidance > 1 and name != "Flux" else 1)
    encoded = [one for batch in model.encode(PROMPTS, guidance) for one in batch]
    for item in read:
        assert any(one.shape[1:] == item.shape[1:] and torch.equal(one[: len(item)], item) for one in encoded)


def test_tokens_that_are_no_padding(family):
    name, _ = family
    model = loaded(*family)
    for component in model.prunable.values():
        tokens = component.tokens(PROMPTS)
        assert (tokens is None) == (component.role == "denoiser")
        if tokens is not None:
            counts = tokens.sum(1).tolist()
            assert counts[1] - counts[0] in (6, 34)  # letters of the prompts, as far as the context goes
            assert counts == TOKENS.get(name, {}).get(component.name, counts)
            assert all(one[:count].all() for one, count in zip(tokens, counts, strict=True))


# --- pruning --------------------------------------------------------------------------------------------------


def prune(family, output, specs, **options):
    """Prune under a plain trainer; returns the module, whose pipeline is pruned in memory, and what was saved."""
    name, directory = family
    data = CocoDataModule(
        EmbeddedWorld(images=4), calibration=EmbeddedWorld("train", 20), calibration_n=3, calibration_batch_size=2
    )
    module = PruningModule(
        made(name, directory), specs, Sampling(steps=2, guidance=GUIDED, **SMALL), output=str(output),
        store=f"{output}/statistics", **options,
    )  # fmt: skip
    trainer = Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, enable_progress_bar=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    (found,) = output.glob("pruned-*")
    return module, found


def test_a_module_that_has_pruned_keeps_no_model_that_its_family_has_unloaded(miniature, tmp_path, tmp_path_factory):
    spec = PruneSpec(sparsity=0.4, criterion="Wanda", order="sequential")
    specs = dict.fromkeys(components_of("Flux"), spec)
    module, _ = prune(saved("Flux", tmp_path_factory), tmp_path, specs)
    parts = [weakref.ref(one) for one in module.pipeline.components.values()]
    module.pipeline.unload()
    assert [one for one in parts if one() is not None] == []


WAYS = [
    ("Magnitude", "one_pass"), ("Wanda", "one_pass"), ("Wanda", "sequential"), ("SparseGPT", "one_pass"),
    ("SparseGPT", "sequential"),
]  # fmt: skip


@pytest.mark.parametrize(("criterion", "order"), WAYS)
def test_every_component_is_pruned_to_the_weight_and_plain_diffusers_draws_the_same(
    family, miniature, tmp_path, criterion, order
):
    name, directory = family
    spec = PruneSpec(sparsity=0.4, criterion=criterion, order=order)
    module, found = prune(family, tmp_path, dict.fromkeys(components_of(name), spec))
    report = json.loads((found / "pruning_report.json").read_text())
    before, after = plain(directory), plain(found)
    for component in components_of(name):
        dense, pruned = (getattr(pipe, component).state_dict() for pipe in (before, after))
        layers = {layer["name"]: layer for layer in report["layers"][component]}
        assert layers
        for layer, counts in layers.items():
            own, weight = pruned[f"{layer}.weight"], dense.pop(f"{layer}.weight")
            zero = own == 0
            assert int(zero.sum()) == counts["zeros"]
            assert counts["pruned"] == int(0.4 * zero.numel() + 0.5)
            assert criterion == "SparseGPT" or torch.equal(own[~zero], weight[~zero])
        assert all(torch.equal(pruned[key], value) for key, value in dense.items())  # nothing else has changed
    drawn = module.pipeline.generate(PROMPTS, SEEDS, Sampling(steps=2, guidance=GUIDED, **SMALL))
    assert differ(drawn, drawn_plainly(name, after, 2, GUIDED)) <= 1


def small(verb, config, family, output, *options):
    name, directory = family
    pipeline = [f"--model.pipeline={name}", f"--model.pipeline.model={directory}", "--model.sampling.steps=2"]
    pipeline += [f"--model.sampling.height={SIDE}", f"--model.sampling.width={SIDE}"]
    data = ["--data.source.images=20", "--data.calibration_n=3", "--data.calibration_batch_size=2", CPU]
    where = [f"--model.store={output}/statistics", f"--model.output={output}"]
    dense = [f"--model.prune.{component}.sparsity=0" for component in components_of(name)]
    return [verb, "--config", str(CONFIGS / config), *pipeline, *data, *where, "--model.prune={}", *dense, *options]


def each(name, option):
    return [f"--model.prune.{component}.{option}" for component in components_of(name)]


def test_a_budget_predict_and_report(family, sdprune, tmp_path):
    drawn = ["--data.n=4", "--data.batch_size=2", "--model.samples=[a red star]", "--model.budget.total=0.05"]
    drawn += ["--model.budget.counting=actual", "--model.budget.decimals=4"]
    told = sdprune(*small("predict", "predict.yaml", family, tmp_path, *drawn))
    assert (told.code, told.err) == (0, "")
    run = the_run(tmp_path, "text_encoder")
    results = json.loads((run / "results.json").read_text())
    sparsities = json.loads((run / "config.json").read_text())["prune"]
    assert results["sparsity"]["prunable"]["pruned_fraction"] == pytest.approx(0.05, abs=1e-4)
    text = [one for component, one in results["sparsity"]["components"].items() if "text" in component]
    pruned = sum(one["pruned"] for one in text)
    assert pruned == pytest.approx(results["sparsity"]["prunable"]["pruned"] / 2, rel=0.01)
    told = sdprune("report", tmp_path, f"--out={tmp_path / 'report'}")
    assert (told.code, told.err) == (0, "")
    table = pandas.read_csv(tmp_path / "report" / "tables" / "runs.csv")
    for kind, role in (("text", "text"), ("image", "denoiser")):
        own = [spec["sparsity"] for name, spec in sparsities.items() if results["roles"][name] == role]
        assert set(table[kind]) == {0.0, own[0]}
        assert own == own[:1] * len(own)


def test_a_budget_of_shares_by_component(sdprune, tmp_path, tmp_path_factory):
    family = saved("StableDiffusion3", tmp_path_factory)
    options = ["--model.budget={total: 0.1, counting: actual, decimals: 4}"]
    options += ["--model.budget.shares={text_encoder_2: 0.01, text_encoder_3: 0.04, transformer: 0.95}"]
    told = sdprune(*small("fit", "prune.yaml", family, tmp_path, *options))
    assert (told.code, told.err) == (0, "")
    (found,) = tmp_path.glob("pruned-*")
    sparsity = json.loads((found / "pruning_report.json").read_text())["sparsity"]
    pruned = {name: one["pruned"] / sparsity["prunable"]["pruned"] for name, one in sparsity["components"].items()}
    assert sparsity["prunable"]["pruned_fraction"] == pytest.approx(0.1, abs=1e-4)
    wanted = {"text_encoder": 0, "text_encoder_2": 0.01, "text_encoder_3": 0.04, "transformer": 0.95, "vae": 0}
    assert pruned == pytest.approx(wanted, abs=1e-3)


def test_a_measured_budget_reads_every_component_at_the_prediction(family, miniature, tmp_path):
    name, _ = family
    measured = Sensitivity(unit="block", levels=[0.3, 0.8], samples=2, steps=2)
    specs = dict.fromkeys(components_of(name), PruneSpec(allocation=measured))
    _, found = prune(family, tmp_path, specs, budget=Budget(total=0.1, split="sensitivity"))
    report = json.loads((found / "pruning_report.json").read_text())
    assert list(report["budget"]["sparsities"]) == components_of(name)
    whole = report["sparsity"]["prunable"]
    assert whole["pruned"] == int(0.1 * whole["parameters"] + 0.5)
    for component in components_of(name):
        measured = report["pruning"][component]["sensitivity"]
        assert measured["read_at"] == "prediction"
        unread = {unit["name"] for unit in measured["units"] if not any(unit["errors"])}
        assert not unread  # what no prediction depends on is left out


def test_another_familys_model_names_the_family(family):
    name, directory = family
    for other in tiny_families.FAMILIES.keys() - {name}:
        with pytest.raises(InputError, match=rf"use --model\.pipeline={name}\."):
            _ = made(other, directory).prunable


# --- calibration ----------------------------------------------------------------------------------------------

ALIKE = ["a red star", "two cats !", "blue boxes"]  # of one length: nothing in a batch is padded to another's


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(ALIKE))
    return TextFile(str(path))


def test_statistics_of_a_denoiser_are_those_of_single_images(family, miniature, prompts, tmp_path):
    """Batches of two, the last with filler; the copy without prompt counts as much as is said, wherever it is."""
    (name, directory), unconditional = family, 0.25
    model, sampling = made(name, directory), Sampling(steps=2, guidance=GUIDED, **SMALL)
    module = CalibrationModule(
        model, [model.denoiser], ["input_norm"], sampling=sampling,
        calibration=Calibration(unconditional=unconditional), store=str(tmp_path / "statistics"),
    )  # fmt: skip
    data = CocoDataModule(prompts, calibration_n=3, calibration_batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, enable_progress_bar=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    (file,) = tmp_path.glob("statistics/*-input_norm-*/*.safetensors")
    found = load_file(file)
    pipe, wanted = plain(directory), {}
    denoiser = getattr(pipe, model.denoiser)
    for layer in found:
        denoiser.get_submodule(layer).register_forward_pre_hook(
            lambda module, args, layer=layer: wanted.setdefault(layer, []).append(args[0].double())
        )
    for position, prompt in enumerate(ALIKE):
        drawn_plainly(name, pipe, 2, GUIDED, [prompt], [image_seed(0, f"calibration:{position}")])
    assert found.keys() == wanted.keys()
    for layer, inputs in wanted.items():
        calls = len(inputs) // 6  # a step; three images, two steps
        halves = {"Flux": [1.0], "QwenImage": [1.0], "ZImage": [1.0, unconditional]}.get(name, [unconditional, 1.0])
        norms = torch.zeros(2, inputs[0].shape[-1], dtype=torch.float64)
        for number, one in enumerate(inputs):
            weights = [unconditional] if number % calls else halves
            squares = [part.square().flatten(0, -2).sum(0) for part in one.chunk(len(weights))]
            norms[number // calls % 2] += sum(w * square for w, square in zip(weights, squares, strict=True)) / calls
        torch.testing.assert_close(found[layer][:, 0].double(), norms / 3, rtol=2e-4, atol=1e-6, msg=layer)


@pytest.mark.parametrize("empty", [0.0, 0.25])
def test_statistics_of_text_encoders_are_those_of_single_prompts(family, miniature, prompts, empty, tmp_path):
    """The empty or negative prompt counts as much as is said, where the pipeline reads one."""
    name, directory = family
    model, sampling = made(name, directory), Sampling(steps=1, guidance=GUIDED, **SMALL)
    encoders = components_of(name)[:-1]
    module = CalibrationModule(
        model, encoders, ["input_norm"], sampling=sampling, calibration=Calibration(empty_prompt=empty),
        store=str(tmp_path / "statistics"),
    )  # fmt: skip
    data = CocoDataModule(prompts, calibration_n=3, calibration_batch_size=2)
    trainer = Trainer(accelerator="cpu", logger=False, use_distributed_sampler=False, enable_progress_bar=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    pipe, seen = plain(directory), {}
    for encoder, (layer, one) in ((own, pair) for own in encoders for pair in getattr(pipe, own).named_modules()):
        one.register_forward_pre_hook(
            lambda _, args, key=(encoder, layer): seen.setdefault(key, []).append(args[0].double()) if args else None
        )
    for prompt in ALIKE:
        drawn_plainly(name, pipe, 1, GUIDED, [prompt], [0])
    for encoder in encoders:
        (file,) = tmp_path.glob(f"statistics/{encoder}-input_norm-*/*.safetensors")
        found = load_file(file)
        assert found
        for layer, norms in found.items():
            inputs = seen[encoder, layer]
            calls = len(inputs) // len(ALIKE)
            assert calls == (1 if name in ("Flux", "StableDiffusionXL") else 2)
            squares = [one.square().flatten(0, -2).sum(0) for one in inputs]
            wanted = sum((empty if number % calls else 1) * one for number, one in enumerate(squares)) / len(ALIKE)
            wanted /= calls if empty else 1  # means over calls
            torch.testing.assert_close(norms[0, 0].double(), wanted, rtol=2e-4, atol=1e-6, msg=f"{encoder} {layer}")


@pytest.fixture(scope="module")
def resumed(miniature, tmp_path_factory):
    """By family, what an undisturbed run leaves, and what two processes make of one that was interrupted.

    The second process starts once for all families: that takes longer than their runs do.
    """
    made, commands = {}, []
    for name in tiny_families.FAMILIES:
        family, (whole, cut) = saved(name, tmp_path_factory), (tmp_path_factory.mktemp(name) for _ in range(2))
        for output in (whole, cut):
            words = small("predict", "predict.yaml", family, output, *each(name, "criterion=Wanda"), *FEW)
            words += [*each(name, "sparsity=0.4"), f"--model.prune.{components_of(name)[-1]}.order=sequential"]
            assert main(words) == 0 if output == whole else interrupted(words, 2 * len(components_of(name)) + 3) == 130
        assert not list(cut.glob("*/results.json"))
        assert list(cut.glob("statistics/progress-*"))
        made[name] = whole, cut
        commands.append((find_free_network_port(), [*words, "--trainer.devices=2"]))
    file = tmp_path_factory.mktemp("commands") / "commands.json"
    file.write_text(json.dumps(commands))
    done = process([str(file)], timeout=1200, interpreter=(str(Path(__file__).parent / "in_turn.py"),))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    return made


FEW = [
    "--data.n=4", "--data.batch_size=2", "--data.calibration.images=20", "--model.compare_dense=false",
    "--model.samples=[a red star]", "--model.metrics=[{class_path: CLIPScore, init_args: {model: miniature}}]",
]  # fmt: skip


def interrupted(words, batches):
    """The exit code of a run that is interrupted in calibration, after so many batches."""
    visit, left = Collector._visit, [batches]

    def visiting(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return visit(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "_visit", visiting)
        patch.setattr("sdprune.calibration.collect._SAVING", 1e9)  # after every batch, whatever it costs
        return main(words)


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_interrupted_and_resumed_by_two_processes(resumed, name):
    """In the denoiser's calibration in sequential order; every statistic, picture and score is the same."""
    whole, cut = (everything(output) for output in resumed[name])
    assert differences(whole, cut) == []
    assert sum(path.suffix == ".png" for path in whole) >= 4
    assert sum(path.suffix == ".safetensors" for path in whole) > len(components_of(name)) + 1  # a stage each


# --- a further family, and what all rely on -------------------------------------------------------------------

ALPHA = """
from sdprune.pipelines.pixart_sigma import PixArtSigma


class PixArtAlpha(PixArtSigma):
    \"\"\"A diffusers `PixArtAlphaPipeline`.

    Args:
        model: a hub id or a diffusers directory.
        revision: branch, tag or commit of a hub id.
        variant: file variant of a hub id or directory.
    \"\"\"

    pipeline = "PixArtAlphaPipeline"
"""


def test_a_family_of_ones_own_is_one_file_and_one_config(sdprune, tmp_path, monkeypatch):
    from diffusers import PixArtAlphaPipeline

    PixArtAlphaPipeline(**tiny_families.pixart_sigma().components).save_pretrained(tmp_path / "model")
    (tmp_path / "alpha.py").write_text(ALPHA)
    (tmp_path / "own.yaml").write_text(
        (CONFIGS / "prune.yaml").read_text()
        .replace("class_path: StableDiffusion", "class_path: alpha.PixArtAlpha")
        .replace("model: miniature", "model: model")
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = [f"--model.sampling={{steps: 2, guidance: 3.0, height: {SIDE}, width: {SIDE}}}", CPU]
    options += ["--model.prune={transformer: {sparsity: 0.5, criterion: Wanda}}", "--data.calibration_n=2"]
    told = sdprune("fit", "--config", "own.yaml", *options, "--model.output=runs", "--model.store=statistics")
    assert (told.code, told.err) == (0, "")
    (found,) = (tmp_path / "runs").glob("pruned-*")
    weights = plain(found).transformer.named_parameters()
    zeros = [(one == 0).float().mean() for name, one in weights if name.endswith("to_q.weight")]
    assert zeros
    assert all(abs(one - 0.5) < 0.01 for one in zeros)


@pytest.mark.parametrize("path", sorted(CONFIGS.parent.glob("*/predict.yaml")), ids=lambda path: path.parent.name)
def test_a_shipped_configuration_has_the_pipelines_own_steps_and_guidance(path):
    import diffusers

    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    cls = getattr(sdprune.pipelines, options["pipeline"]["class_path"])
    model = cls(**options["pipeline"]["init_args"])
    assert options["prune"].keys() == set(components_of(cls.__name__))
    takes = inspect.signature(getattr(diffusers, cls.pipeline).__call__).parameters
    if path.parent.name in ("mini", "z_image"):  # made for fewer steps
        return
    assert options["sampling"]["steps"] == takes["num_inference_steps"].default
    for name, value in model.guide(options["sampling"]["guidance"], 1).items():
        assert name == "negative_prompt" or value == takes[name].default


def test_the_page_has_the_pipelines_own_steps_and_guidance():
    import diffusers

    lines = (Path(__file__).parents[1] / "docs" / "families.md").read_text().split("## What differs")[1].splitlines()
    rows = [[one.strip(" `") for one in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    for name, _, numbers, *_ in rows:
        model = getattr(sdprune.pipelines, name)()
        takes = inspect.signature(getattr(diffusers, model.pipeline).__call__).parameters
        steps, guidance = map(float, numbers.split(", "))
        assert steps == takes["num_inference_steps"].default
        for option, value in model.guide(guidance, 1).items():
            assert option == "negative_prompt" or value == takes[option].default
    assert sorted(row[0] for row in rows) == sorted(tiny_families.FAMILIES)


def test_diffusers_has_what_a_family_relies_on(family):
    import diffusers
    import transformers

    name, directory = family
    cls, pipe = getattr(sdprune.pipelines, name), plain(directory)
    assert type(pipe).__name__ == cls.pipeline
    for library, classes in cls.parts.values():
        assert any(hasattr({"diffusers": diffusers, "transformers": transformers}[library], one) for one in classes)
    assert all(hasattr(diffusers, one) for one in cls.schedulers)
    model = made(name, directory)
    takes = inspect.signature(pipe.__call__).parameters
    common = {"prompt", "height", "width", "num_inference_steps", "latents", "generator", "output_type"}
    assert takes.keys() >= common | cls.call.keys() | model.guide(2.0, 1).keys()
    assert {"prompt", "device"} <= inspect.signature(pipe.encode_prompt).parameters.keys()
    assert pipe.vae_scale_factor in (2, 4)
    assert {*components_of(name), "vae"} <= set(pipe.model_cpu_offload_seq.split("->"))
    first, *others = inspect.signature(getattr(pipe, model.denoiser).forward).parameters
    assert first in ("sample", "hidden_states", "x")
    assert cls.timestep in others


def test_no_picture_depends_on_the_layers_that_are_left_out(family):
    name, directory = family
    model, pipe = made(name, directory), plain(directory)
    before = drawn_plainly(name, pipe, 2, GUIDED)
    for component in model.prunable.values():
        own, idle = getattr(pipe, component.name), component.idle(["Linear"])
        tied = {id(one.weight) for one in own.modules() if isinstance(one, torch.nn.Embedding)}
        layers = [layer for layer, _ in own.named_modules() if any(fnmatch.fnmatch(layer, one) for one in idle)]
        assert bool(layers) == (component.name in model.idle)
        for layer in layers:
            weight = getattr(own.get_submodule(layer), "weight", None)
            if weight is not None and id(weight) not in tied:
                weight.data.zero_()
    assert np.array_equal(before, drawn_plainly(name, pipe, 2, GUIDED))
