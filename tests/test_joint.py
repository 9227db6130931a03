"""A total that measured errors share out among all components: against every combination, and pruning by hand."""

import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from command_lines import fit, predict, process, runs, the_run
from safetensors.torch import load_file
from test_sensitivity import interpolated, lowest, noting

from sdprune.errors import InputError
from sdprune.pruning import Budget, InfeasibleError, Size
from sdprune.pruning.error_path import Unit

LEVELS = [0.3, 0.5, 0.8]


def problem(seed):
    """Three units of two components, with convex errors: powers of 1 and more, that grow."""
    rng = np.random.default_rng(seed)
    units = []
    for group, size in (("text_encoder", 2000), ("unet", 4000), ("unet", 8000)):
        (first, second), start = sorted(rng.uniform(1, 6, 2)), 10 ** rng.uniform(-3, 0)
        middle = start * (LEVELS[1] / LEVELS[0]) ** first
        units.append(Unit(group, size, LEVELS, [start, middle, middle * (LEVELS[2] / LEVELS[1]) ** second]))
    return {"text_encoder": Size(3000, 2000), "unet": Size(17000, 12000)}, units


@pytest.mark.parametrize("total", [0.05, 0.2, 0.4, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_split_of_a_total_has_a_smaller_sum_of_errors(total, seed):
    """Every combination in steps of a twentieth with the same count of zeros over all parameters."""
    sizes, units = problem(seed)
    split = Budget(total, split="sensitivity").split_measured(sizes, units)
    (point,) = (point for point in split.path if point.total == total)
    assert split.sparsities == point.sparsities
    lost = {name: sparsity * sizes[name].targets for name, sparsity in split.sparsities.items()}
    assert sum(lost.values()) == pytest.approx(total * 20000, abs=1e-9)
    costs = {}
    for shares in itertools.product([step / 20 for step in range(17)], repeat=3):  # up to the highest level
        counts = [share * unit.size for share, unit in zip(shares, units, strict=True)]
        if abs(sum(counts) - total * 20000) < 1e-6:
            cost = sum(interpolated(LEVELS, unit.errors, share) for share, unit in zip(shares, units, strict=True))
            costs[counts[0]] = min(cost, costs.get(counts[0], math.inf))
    assert point.error <= min(costs.values()) * 1.001  # in half per cents
    best = min(costs, key=costs.get)
    assert abs(lost["text_encoder"] - best) <= 200  # two steps of the rivals' grid


def test_the_path_goes_up_to_what_was_measured_and_beyond_it_all_are_alike():
    sizes, units = problem(0)
    split = Budget(0.62, split="sensitivity").split_measured(sizes, units)
    assert [point.total for point in split.path] == [step / 20 for step in range(12)]  # 0.8 of 14,000 weights of 20,000
    assert [point.error for point in split.path] == sorted(point.error for point in split.path)
    assert split.path[0] == (0.0, {"text_encoder": 0.0, "unet": 0.0}, 0.0)
    assert split.sparsities == dict.fromkeys(sizes, 1240 / 1400)
    with pytest.raises(InfeasibleError, match=r"total of 0\.71 would prune 14,200 weights, .* have 14,000\. Choose a"):
        Budget(0.71, split="sensitivity").split_measured(sizes, units)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "ratio"}, "Unknown split 'ratio'. Choices: share, sensitivity"),
        ({"split": "sensitivity", "text_share": 0.4}, "budget.text_share is 0.4, which has no effect with"),
        ({"split": "sensitivity", "counting": "actual"}, "budget.counting is actual, which has no effect with"),
    ],
)
def test_options_that_have_no_effect_are_refused(options, words):
    with pytest.raises(InputError) as caught:
        Budget(0.3, **options)
    assert words in str(caught.value)


# --- a pipeline -----------------------------------------------------------------------------------------------

SMALL = "{class_path: Sensitivity, init_args: {levels: [0.3, 0.8], samples: 2, steps: 2}}"
FEW = [
    "--model.prune={}", "--model.budget.split=sensitivity",
    f"--model.prune.text_encoder.allocation={SMALL}", f"--model.prune.unet.allocation={SMALL}",
    "--model.prune.text_encoder.include=['*self_attn.q_proj']", "--model.prune.unet.include=['*attn2.to_v']",
]  # fmt: skip
TOTAL = "--model.budget.total=0.004"


def measured(output, component="text_encoder", statistic="pruned_error"):
    (directory,) = (output / "statistics").glob(f"{component}-{statistic}-*")
    return {layer: value for file in directory.glob("*.safetensors") for layer, value in load_file(file).items()}


def results_of(output):
    return json.loads((the_run(output, "total-") / "results.json").read_text())


def test_errors_of_a_text_encoder_are_those_of_the_guided_prediction(sdprune, tmp_path):
    """The dense U-Net, on the latents of the dense model, reads what the pruned encoder makes of prompt and nothing."""
    from sdprune.mini.source import EmbeddedWorld
    from sdprune.pipelines import Sampling, StableDiffusion
    from sdprune.pipelines.sampling import image_seed

    told = sdprune(*fit("prune", tmp_path, *FEW, TOTAL, "--model.sampling.steps=4"))
    assert (told.code, told.err) == (0, "")
    model, calls = StableDiffusion("miniature"), []
    model.load(torch.float32, torch.device("cpu"))
    unet, encoder = model.components["unet"], model.components["text_encoder"]
    hook = unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    captions, seeds = list(source.load()["caption"])[:2], [image_seed(0, f"calibration:{i}") for i in range(2)]
    model.generate(captions, seeds, Sampling(steps=4, guidance=2.5), decode=False)
    hook.remove()
    tokenizer = model.tokenizers["tokenizer"]
    ids = tokenizer(
        ["", "", *captions], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids

    def predictions():
        hidden = encoder(ids)[0]
        outputs = [unet(*args, encoder_hidden_states=hidden).sample for args in (calls[1], calls[3])]
        return [(out[i] + 2.5 * (out[2 + i] - out[i])).flatten() for i, out in enumerate(outputs)]

    found = measured(tmp_path, statistic="alone_error")
    assert found
    with torch.no_grad():
        dense = predictions()
        for name, errors in found.items():
            weight = encoder.get_submodule(name).weight
            original = weight.clone()
            for level, error in zip((0.3, 0.8), errors.tolist(), strict=True):
                weight.copy_(lowest(original, level))
                ratios = [
                    float((new - old).square().sum() / old.square().sum())
                    for new, old in zip(predictions(), dense, strict=True)
                ]
                assert error == pytest.approx(sum(ratios) / 2, rel=1e-3)
            weight.copy_(original)


def test_one_multiplier_for_the_layers_of_all_components(sdprune, tmp_path):
    """No layer could lose a weight that costs less than one that another layer lost."""
    told = sdprune(*fit("prune", tmp_path, *FEW, TOTAL))
    assert (told.code, told.err) == (0, "")
    assert re.search(r"total +text_encoder +unet +error\n +0\.00 % +0\.00 % +0\.00 % +0\n> +0\.40 % ", told.out)
    (saved,) = tmp_path.glob("pruned-total-0.004-*")
    report = json.loads((saved / "pruning_report.json").read_text())
    everything = sum(report["sparsity"]["components"][name]["parameters"] for name in ("text_encoder", "unet"))
    assert report["sparsity"]["prunable"]["pruned"] == math.floor(0.004 * everything + 0.5)
    paid, saved = [], []
    for name, layers in report["layers"].items():
        errors = measured(tmp_path, name)
        assert {layer["name"] for layer in layers} == set(errors)
        for layer in layers:
            (a, b), share = errors[layer["name"]].tolist(), layer["pruned"] / layer["weights"]
            power = math.log(b / a) / math.log(0.8 / 0.3)
            if power > 1 and 0.01 < share < 0.79:  # else all or nothing

                def error_per_weight(share, a=a, power=power, weights=layer["weights"]):
                    return a * power * share ** (power - 1) / 0.3**power / weights

                paid.append(error_per_weight(share - 0.0042))  # sparsities are compared in steps of 0.8 / 200
                saved.append(error_per_weight(share + 0.0042))
    assert len(paid) > 2
    assert max(paid) <= min(saved)


def test_a_total_is_measured_once_killed_or_not(sdprune, tmp_path, monkeypatch):
    seen = []
    noting(monkeypatch, seen, most=3)
    assert sdprune(*predict(tmp_path, *FEW, TOTAL)).code == 1
    first = [name for names in seen for name in names]
    noting(monkeypatch, seen)
    told = sdprune(*predict(tmp_path, *FEW, TOTAL))
    assert (told.code, told.err) == (0, "")
    layers = [name for names in seen for name in names]
    assert len(first) == 3
    assert len(layers) == len(set(layers)) == len(measured(tmp_path)) + len(measured(tmp_path, "unet"))
    assert "> 0.40 %" in told.out
    results = results_of(tmp_path)
    budget, pruning = results["budget"], results["pruning"]
    assert (budget["total"], budget["split"]) == (0.004, "sensitivity")
    assert {name: one["pruned"] / one["weights"] for name, one in pruning.items()} == budget["sparsities"]
    places = [unit["block"].partition(".")[0] for unit in pruning["unet"]["sensitivity"]["units"]]
    assert list(dict.fromkeys(places)) == ["down_blocks", "mid_block", "up_blocks"]  # as they run, not as they lie
    for name, one in pruning.items():
        units, errors = one["sensitivity"]["units"], measured(tmp_path, name)
        assert {unit["name"]: unit["errors"] for unit in units} == {
            key: value.tolist() for key, value in errors.items()
        }
        assert sum(unit["pruned"] for unit in units) == one["pruned"]
    seen.clear()
    told = sdprune(*predict(tmp_path, *FEW, "--model.budget.total=0.006"))
    assert (told.code, told.err, seen) == (0, "", [])
    assert len(runs(tmp_path, "total-")) == 2
    ranked_and_drawn(sdprune, tmp_path)


def ranked_and_drawn(sdprune, tmp_path):
    """The report: of both runs one measurement, the layers with the largest error at the middle level first."""
    told = sdprune("report", tmp_path, f"--out={tmp_path / 'report'}")
    assert (told.code, told.err) == (0, "")
    assert [path.name for path in (tmp_path / "report" / "figures").glob("sensitivity*")] == ["sensitivity_1.svg"]
    assert "Where the meaning sits" in (tmp_path / "report" / "report.md").read_text()
    for number, component in enumerate(("text_encoder", "unet"), 1):
        table = pd.read_csv(tmp_path / "report" / "tables" / f"sensitivity_{number}.csv")
        errors = {name: value.tolist()[1] for name, value in measured(tmp_path, component).items()}
        ranked = sorted(errors, key=errors.get, reverse=True)
        assert list(table["layer"][:15]) == ranked[:15]
        assert table["of the error at 80 %"][0] == f"{100 * errors[ranked[0]] / sum(errors.values()):.1f} %"
    assert len(list((tmp_path / "report" / "tables").glob("sensitivity*"))) == 2


def test_two_processes_share_a_total_out_alike(sdprune, tmp_path):
    done = process(predict(tmp_path / "two", *FEW, TOTAL, "--trainer.devices=2", "--trainer.strategy=ddp"))
    assert (done.returncode, done.stderr) == (0, "")
    assert sdprune(*predict(tmp_path / "one", *FEW, TOTAL)).code == 0
    one, two = (results_of(tmp_path / name) for name in ("one", "two"))
    assert one["budget"] == two["budget"]
    assert [part["mask_hash"] for part in one["pruning"].values()] == [
        part["mask_hash"] for part in two["pruning"].values()
    ]
    for component in ("text_encoder", "unet"):
        found, other = (measured(tmp_path / name, component) for name in ("one", "two"))
        assert found.keys() == other.keys()
        assert all(torch.equal(value, other[layer]) for layer, value in found.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["unet.sparsity=0.35"], "gives unet a measured sparsity, where --model.prune.unet has 0.35. Leave it to the"),
        (["unet.allocation=OWL"], "--model.prune.unet.allocation is OWL: leave it out, or choose Sensitivity"),
        (["unet.granularity=component"], "--model.prune.unet.granularity=component ranks all layers together"),
        (["unet.criterion=Wanda", "unet.order=sequential"], "--model.prune.unet.order is sequential: choose one_pass"),
        (["unet.mode=original"], "--model.prune.unet.mode is original: choose exact"),
    ],
)
def test_what_leaves_measurement_no_room_is_refused(sdprune, tmp_path, options, words):
    told = sdprune(
        *fit("prune", tmp_path, "--model.prune={}", "--model.budget.split=sensitivity", TOTAL),
        *(f"--model.prune.{option}" for option in options),
    )
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert words in told.err
    assert not list(tmp_path.iterdir())


def test_a_total_that_cannot_be_met_ends_as_a_record(sdprune, tmp_path):
    told = sdprune(*predict(tmp_path, *FEW, "--model.budget.total=0.9"))
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith("Infeasible: a total of 0.9 would prune")
    assert the_run(tmp_path, "infeasible-0.9-sensitivity")
    assert not list(tmp_path.rglob("*.safetensors"))
