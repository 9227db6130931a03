"""Gathering through the command line: every method on both components, any number of processes, any interruption."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_lines import fit, predict, process, the_run
from safetensors.torch import load_file

from sdprune import gather
from sdprune.calibration.collect import Collector
from sdprune.pipelines import Sampling, StableDiffusion
from sdprune.pipelines.sampling import image_seed
from sdprune.pruning import PruneSpec, apply, find_targets, targets_of

BOTH = ("text_encoder", "unet")


def each(option: str) -> list[str]:
    return [f"--model.prune.{component}.{option}" for component in BOTH]


METHODS = {
    "wanda": each("criterion=Wanda"),
    "wanda-owl-conv": [*each("criterion=Wanda"), *each("allocation=OWL"), "--model.prune.unet.layers=[Linear, Conv2d]"],
    "sparsegpt": [*each("criterion=SparseGPT"), "--model.prune.unet.timesteps=log_decrease"],
    "sequential": [
        *each("criterion=Wanda"),
        *each("allocation=OWL"),
        *each("order=sequential"),
        "--model.prune.unet.layers=[Linear, Conv2d]",
    ],
}


def statistics(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By kind (`unet-hessian`), what the store holds."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted((output / "statistics").glob("*/*.safetensors")):
        found.setdefault(file.parent.name, {}).update(load_file(file))
    return found


def pruned(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    (directory,) = output.glob("pruned-*")
    return {part: load_file(next((directory / part).glob("*.safetensors"))) for part in BOTH}


def equal(one: dict[str, dict[str, torch.Tensor]], two: dict[str, dict[str, torch.Tensor]]) -> bool:
    return one.keys() == two.keys() and all(
        one[key].keys() == two[key].keys() and all(torch.equal(one[key][name], two[key][name]) for name in one[key])
        for key in one
    )


@pytest.fixture(scope="module")
def alone(miniature, tmp_path_factory):
    """What one process comes to, by method."""
    from sdprune.__main__ import main

    outputs = {}
    for name, options in METHODS.items():
        outputs[name] = tmp_path_factory.mktemp(name)
        assert main([str(argument) for argument in fit("prune", outputs[name], *options)]) == 0
    return outputs


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact(alone, method):
    (directory,) = alone[method].glob("pruned-*")
    report = json.loads((directory / "pruning_report.json").read_text())
    for component, sparsity in (("text_encoder", 0.475), ("unet", 0.35)):
        layers = report["layers"][component]
        weights = sum(layer["weights"] for layer in layers)
        if "owl" in method or method == "sequential":
            assert sum(layer["pruned"] for layer in layers) == int(weights * sparsity + 0.5)
            shares = {round(layer["pruned"] / layer["weights"], 3) for layer in layers}
            assert len(shares) > 1
        else:
            assert all(layer["pruned"] == int(layer["weights"] * sparsity + 0.5) for layer in layers)
        assert all(layer["zeros"] >= layer["pruned"] for layer in layers)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("method", ["wanda-owl-conv", "sparsegpt", "sequential"])
def test_unequal_shares_of_several_processes_give_the_same_bits(alone, tmp_path, method, processes):
    """3 batches: 2 and 1 of them, or one each, the last with filler."""
    if processes == 3 and method == "sequential":
        pytest.skip("two processes show it")
    done = process(fit("prune", tmp_path, *METHODS[method], f"--trainer.devices={processes}"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    assert equal(statistics(tmp_path), statistics(alone[method]))
    assert equal(pruned(tmp_path), pruned(alone[method]))


def prompts_and_seeds(sampling_seed: int = 0) -> tuple[list[str], list[int]]:
    from sdprune.mini.source import EmbeddedWorld

    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    return list(source.load()["caption"])[:5], [image_seed(sampling_seed, f"calibration:{i}") for i in range(5)]


def loaded() -> StableDiffusion:
    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    return model


def test_the_text_encoders_statistics_are_those_of_its_inputs(alone, miniature):
    """The same numbers from the public function on token ids alone."""
    model, (prompts, _) = loaded(), prompts_and_seeds()
    text = model.components["text_encoder"]
    tokens = model.tokenizers["tokenizer"](prompts, padding="max_length", return_tensors="pt")["input_ids"]
    own = gather(text, [tokens[:2], tokens[2:4], tokens[4:]], PruneSpec(0.5, criterion="Wanda"), ["input_norm"])
    (stored,) = (v for k, v in statistics(alone["wanda"]).items() if k.startswith("text_encoder-input_norm"))
    assert stored.keys() == own["input_norm"].keys()
    for name, value in stored.items():
        torch.testing.assert_close(value, own["input_norm"][name], rtol=1e-5, atol=1e-7)


def test_sequential_order_on_the_text_encoder_is_block_by_block_by_hand(alone, miniature):
    """Replayed blocks give the statistics of whole runs of the partly pruned model."""
    model, (prompts, _) = loaded(), prompts_and_seeds()
    text = model.components["text_encoder"]
    tokens = model.tokenizers["tokenizer"](prompts, padding="max_length", return_tensors="pt")["input_ids"]
    batches = [tokens[:2], tokens[2:4], tokens[4:]]
    spec = PruneSpec(0.475, criterion="Wanda", allocation="OWL", order="sequential")
    dense = gather(text, batches, PruneSpec(0.475, allocation="OWL"), ["input_norm"])
    own = gather(text, batches, spec, ["input_norm"], dense)
    report = apply(text, spec, own, dense)
    stored = pruned(alone["sequential"])["text_encoder"]
    (directory,) = alone["sequential"].glob("pruned-*")
    layers = json.loads((directory / "pruning_report.json").read_text())["layers"]["text_encoder"]
    assert [layer["pruned"] for layer in layers] == [layer.pruned for layer in report.layers]
    for target in targets_of(text, spec):
        differing = (target.weight == 0) != (stored[f"{target.name}.weight"] == 0)
        assert differing.float().mean() < 1e-3  # sums over other batches round differently


def test_the_unet_sees_every_step_and_fresh_noise(alone, miniature):
    """Norms by step equal those of a run of the sampler by hand, one hook a layer."""
    model, (prompts, seeds) = loaded(), prompts_and_seeds()
    unet = model.components["unet"]
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        target.module.register_forward_pre_hook(
            lambda module, args, name=target.name: seen.setdefault(name, []).append(
                args[0].double().square().flatten(0, -2).sum(0)
            )
        )
        for target in find_targets(unet)
    ]
    prompts += prompts[-1:]  # filler, drawn and not counted: its sums are taken off below
    seeds += seeds[-1:]
    for start in (0, 2, 4):
        model.generate(
            prompts[start : start + 2], seeds[start : start + 2], Sampling(steps=2, guidance=2.5), decode=False
        )
    for hook in hooks:
        hook.remove()
    (stored,) = (v for k, v in statistics(alone["wanda"]).items() if k.startswith("unet-input_norm"))
    assert stored.keys() == seen.keys()
    for name, calls in seen.items():
        assert len(calls) == 6
        for step in range(2):
            whole = calls[step] + calls[2 + step] + calls[4 + step] / 2  # both items of the last batch are equal
            torch.testing.assert_close(stored[name][step, 0].double() * 5, whole, rtol=1e-4, atol=1e-6)


def test_packages_that_fit_into_memory_give_the_same_hessians(alone, tmp_path, sdprune):
    small = [*METHODS["sparsegpt"], "--model.calibration.hessian_gib=0.008"]
    assert sdprune(*fit("prune", tmp_path, *small)).code == 0
    assert len(list((tmp_path / "statistics").glob("unet-hessian-*/*.safetensors"))) > 1
    assert equal(statistics(tmp_path), statistics(alone["sparsegpt"]))
    told = sdprune(*fit("prune", tmp_path / "tiny", *METHODS["sparsegpt"], "--model.calibration.hessian_gib=0.0001"))
    assert told.code == 2
    assert "raise the limit" in told.err


@pytest.mark.parametrize("method", ["wanda-owl-conv", "sparsegpt", "sequential"])
def test_an_interrupted_gathering_goes_on(alone, tmp_path, sdprune, monkeypatch, method):
    """Stop after some batches, again and again: none is run twice, and the result is the same."""
    visit, counted, limits = Collector._visit, [], [2, 1, 4, 3, 5, 2, 7, 10_000]

    def counting(self, *arguments):
        if len(counted) == limits[0]:
            raise RuntimeError("stopped")
        counted.append(1)
        return visit(self, *arguments)

    monkeypatch.setattr(Collector, "_visit", counting)
    monkeypatch.setattr("sdprune.calibration.collect._SAVING", 1e9)  # after every batch, whatever it costs
    total = 0
    while sdprune(*fit("prune", tmp_path, *METHODS[method])).code == 1:
        total += len(counted)
        counted.clear()
        limits.pop(0)
    total += len(counted)
    assert len(limits) < 7
    counted.clear()
    limits[0] = 10_000
    assert sdprune(*fit("prune", tmp_path / "whole", *METHODS[method])).code == 0
    assert len(counted) == total
    assert equal(statistics(tmp_path), statistics(alone[method]))
    assert equal(pruned(tmp_path), pruned(alone[method]))
    assert not list((tmp_path / "statistics").glob("progress-*"))


def test_a_killed_gathering_goes_on(alone, tmp_path):
    command = [Path(sys.executable).parent / "sdprune", *fit("prune", tmp_path, *METHODS["sequential"])]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list((tmp_path / "statistics").glob("progress-*")) and time.monotonic() < limit:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = process(fit("prune", tmp_path, *METHODS["sequential"]))
    assert (done.returncode, done.stderr) == (0, "")
    assert equal(pruned(tmp_path), pruned(alone["sequential"]))


def test_forty_cells_cost_one_gathering(sdprune, tmp_path, monkeypatch, miniature):
    """4 methods x 10 sparsities find every statistic in the store."""
    calibrate = fit("calibrate", tmp_path, "--model.statistics=[input_norm, hessian]")
    assert sdprune(*calibrate).code == 0
    monkeypatch.setattr(Collector, "_visit", lambda *args: pytest.fail("a forward pass"))
    methods = [("Magnitude", "Uniform"), ("Magnitude", "OWL"), ("Wanda", "OWL"), ("SparseGPT", "Uniform")]
    for criterion, allocation in methods:
        options = [*each(f"criterion={criterion}"), *each(f"allocation={allocation}")]
        for sparsity in (0.1, 0.9):  # the sparsity is in no fingerprint of statistics: two stand for ten
            assert sdprune(*fit("prune", tmp_path, *options, *each(f"sparsity={sparsity}"))).code == 0


@pytest.mark.parametrize(
    ("options", "component"),
    [
        (["--model.calibration.padding=false"], "text_encoder"),
        (["--model.calibration.unconditional=0"], "unet"),
        (["--model.sampling.guidance=4"], "unet"),
    ],
)
def test_what_counts_changes_statistics_of_one_component_only(alone, tmp_path, sdprune, options, component):
    assert sdprune(*fit("prune", tmp_path, *METHODS["wanda"], *options)).code == 0
    own, other = statistics(tmp_path), statistics(alone["wanda"])
    assert {key.partition("-")[0] for key in own.keys() ^ other.keys()} == {component}
    (mine,), (usual,) = ([v for k, v in found.items() if k.startswith(component)] for found in (own, other))
    assert any((mine[name] != usual[name]).any() for name in mine)  # the time embedding sees neither
    if "guidance" not in options[0]:
        assert all((mine[name] <= usual[name] * (1 + 1e-6)).all() for name in mine)


def test_the_empty_prompt_counts_in_sequential_order(sdprune, tmp_path):
    """Blocks that are run again on what was kept see the calls that a run of the pipeline has."""
    options = ["--model.prune.unet.sparsity=0", "--model.prune.text_encoder.criterion=Wanda"]
    options += ["--model.prune.text_encoder.order=sequential"]
    for name, more in (("kept", ["empty_prompt=1"]), ("runs", ["empty_prompt=1", "kept_gib=0"]), ("without", [])):
        told = sdprune(*fit("prune", tmp_path / name, *options, *(f"--model.calibration.{one}" for one in more)))
        assert (told.code, told.err) == (0, "")
        assert ("passes, each with its pipeline" in told.out) == (name == "runs"), told.out
    assert equal(pruned(tmp_path / "kept"), pruned(tmp_path / "runs"))
    assert not equal(pruned(tmp_path / "kept"), pruned(tmp_path / "without"))


def test_padding_alone_cannot_count_and_not_count(sdprune, tmp_path):
    told = sdprune(*fit("prune", tmp_path, "--model.calibration={padding: false, empty_prompt: 0.5}"))
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "empty_prompt is 0.5 and padding is false" in told.err


def test_predict_prunes_by_sparsegpt_in_memory(alone, tmp_path, sdprune):
    options = [*METHODS["sparsegpt"], "--model.compare_dense=false"]
    assert sdprune(*predict(tmp_path, *options)).code == 0
    results = json.loads((the_run(tmp_path, "text_encoder") / "results.json").read_text())
    assert results["pruning"]["unet"]["spec"]["criterion"] == {"class": "SparseGPT", "options": {"damping": 0.01}}
    assert results["sparsity"]["targets"]["pruned_fraction"] == pytest.approx(0.37, abs=0.05)


def test_more_memory_after_an_interruption_loses_no_layer(alone, tmp_path, sdprune, monkeypatch):
    """Fewer passes than before: what the earlier ones stored counts, and is not overwritten."""
    small = [*METHODS["sparsegpt"], "--model.calibration.hessian_gib=0.008"]
    end_pass, ended = Collector.end_pass, []

    def stopping(self):
        end_pass(self)
        ended.append(1)
        if len(ended) == 3:
            raise RuntimeError("stopped")

    monkeypatch.setattr(Collector, "end_pass", stopping)
    assert sdprune(*fit("prune", tmp_path, *small)).code == 1
    monkeypatch.undo()
    assert sdprune(*fit("prune", tmp_path, *METHODS["sparsegpt"])).code == 0
    assert equal(statistics(tmp_path), statistics(alone["sparsegpt"]))
    assert equal(pruned(tmp_path), pruned(alone["sparsegpt"]))


def test_a_pass_over_a_part_of_the_captions_is_no_pass(miniature, tmp_path, sdprune):
    told = sdprune(*fit("prune", tmp_path, *METHODS["wanda"], "--trainer.limit_predict_batches=1"))
    assert told.code == 2
    assert "The trainer takes 1 of the batches: leave out --trainer.limit_predict_batches" in told.err
    assert not list((tmp_path / "statistics").glob("*/facts.json"))


def test_hessians_in_half_precision(miniature, tmp_path, sdprune):
    told = sdprune(*fit("prune", tmp_path, *METHODS["sparsegpt"], "--trainer.precision=bf16-true"))
    assert told.code == 0, told.err
    hessians = [value for key, one in statistics(tmp_path).items() if "hessian" in key for value in one.values()]
    assert hessians
    assert all(value.dtype == torch.float32 for value in hessians)
