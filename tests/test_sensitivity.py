"""The allocation by measured errors: errors against pruning by hand, sparsities against every combination."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from command_lines import fit, predict, process, the_run
from safetensors.torch import load_file
from torch import nn

from sdprune import gather, prune
from sdprune.calibration.pruned_error import Measurement
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec, Sensitivity, find_targets

LEVELS = [0.3, 0.5, 0.8]
MEASURE = Measurement._of


class Blocks(nn.Module):
    """Two blocks of two layers, and one layer outside of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def network():
    torch.manual_seed(0)
    return Blocks(), [torch.randn(4, 6), torch.randn(3, 6)]


def lowest(weight, share):
    """The weights without the share of lowest magnitude, by sorting."""
    flat = weight.flatten().tolist()
    ranked = sorted(range(len(flat)), key=lambda place: (abs(flat[place]), place))
    gone = set(ranked[: math.floor(share * len(flat) + 0.5)])
    return torch.tensor([0 if place in gone else value for place, value in enumerate(flat)]).view_as(weight)


def errors_by_hand(net, inputs, names, levels=LEVELS):
    """Mean over samples of the squared change of the output over the squared output, of layers pruned together."""
    found = []
    for level in levels:
        changed = copy.deepcopy(net)
        for name in names:
            layer = changed.get_submodule(name)
            layer.weight.data = lowest(layer.weight.data, level)
        ratios = [
            sum((a - b) ** 2 for a, b in zip(new.tolist(), old.tolist(), strict=True)) / sum(b**2 for b in old.tolist())
            for x in inputs
            for new, old in zip(changed(x), net(x), strict=True)
        ]
        found.append(sum(ratios) / len(ratios))
    return found


def sensitivity(unit, samples=8):
    return Sensitivity(unit=unit, levels=LEVELS, samples=samples)


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_errors_are_those_of_pruning_by_hand(unit):
    net, inputs = network()
    before = copy.deepcopy(net.state_dict())
    spec = PruneSpec(sparsity=0.5, allocation=sensitivity(unit))
    found = gather(net, inputs, spec, "alone_error")["alone_error"]
    names = [target.name for target in find_targets(net)]
    assert set(found) == set(names)
    for name in names:
        block = name.rpartition(".")[0]
        together = [one for one in names if unit == "block" and one.rpartition(".")[0] == block] or [name]
        assert found[name].tolist() == pytest.approx(errors_by_hand(net, inputs, together), rel=1e-4), name
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_first_samples_count():
    net, inputs = network()
    spec = PruneSpec(sparsity=0.5, allocation=sensitivity("layer", samples=4))
    (found,) = gather(net, inputs, spec, "alone_error").values()
    assert found["head"].tolist() == pytest.approx(errors_by_hand(net, inputs[:1], ["head"]), rel=1e-4)


class StandingIn(nn.Module):
    """Two equal layers whose outputs are added, and one that has outputs of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(40, 30, bias=False) for _ in range(3))
        self.b.weight.data = self.a.weight.data.clone()

    def forward(self, x):
        return torch.cat([self.a(x) + self.b(x), self.c(x)], 1)


def test_what_units_lose_together_counts():
    """Two equal errors that are added make one of four times the square: each adds three to that of the other, and the
    geometric mean of one and three counts."""
    torch.manual_seed(0)
    net, inputs = StandingIn(), [torch.randn(64, 40)]
    before = copy.deepcopy(net.state_dict())
    allocation = Sensitivity(levels=[step / 40 for step in range(2, 39)], samples=64)
    found = gather(net, inputs, PruneSpec(sparsity=0.5, allocation=allocation), ["alone_error", "pruned_error"])
    alone, beside = found["alone_error"], found["pruned_error"]
    for name, factor in (("a", math.sqrt(3)), ("b", math.sqrt(3)), ("c", 1)):
        assert (beside[name] / alone[name]).tolist() == pytest.approx([factor] * 37, rel=0.1), name
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    chosen = allocation.sparsities(find_targets(net), 0.5, found)
    assert max(chosen["a"], chosen["b"]) < chosen["c"]


def interpolated(levels, errors, sparsity):
    """A power law between neighbouring levels, and beyond them as within."""
    if sparsity == 0:
        return 0.0
    pairs = list(itertools.pairwise(zip(levels, errors, strict=True)))
    (a, ea), (b, eb) = next((pair for pair in pairs if sparsity <= pair[1][0]), pairs[-1])
    power = math.log(eb / ea) / math.log(b / a)
    return ea * (sparsity / a) ** power


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.65, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_sparsities_have_a_smaller_sum_of_errors(sparsity, seed):
    """Every combination in steps of a twentieth with the same count of weights."""
    rng = np.random.default_rng(seed)
    net = nn.ModuleDict({name: nn.Linear(20, rows) for name, rows in (("a", 10), ("b", 20), ("c", 40))})
    errors = {}
    for name in net:  # convex: powers of 1 and more, that grow
        (first, second), start = sorted(rng.uniform(1, 6, 2)), 10 ** rng.uniform(-3, 0)
        middle = start * (LEVELS[1] / LEVELS[0]) ** first
        errors[name] = [start, middle, middle * (LEVELS[2] / LEVELS[1]) ** second]
    statistics = {"pruned_error": {name: torch.tensor(values, dtype=torch.float64) for name, values in errors.items()}}
    targets = find_targets(net)
    sizes = {target.name: target.weight.numel() for target in targets}
    total = sparsity * sum(sizes.values())
    chosen = sensitivity("layer").sparsities(targets, sparsity, statistics)
    assert sum(float(chosen[name]) * size for name, size in sizes.items()) == pytest.approx(total, abs=0.5)

    def cost(shares):
        return sum(interpolated(LEVELS, errors[name], share) for name, share in zip(sizes, shares, strict=True))

    rivals = [
        shares
        for shares in itertools.product([step / 20 for step in range(17)], repeat=3)  # up to the highest level
        if abs(sum(share * size for share, size in zip(shares, sizes.values(), strict=True)) - total) < 1e-6
    ]
    assert len(rivals) > 5
    assert cost([float(chosen[name]) for name in sizes]) <= min(map(cost, rivals)) * 1.001  # in half per cents


def test_nothing_is_pruned_beyond_what_was_measured():
    net = nn.ModuleDict({name: nn.Linear(20, 10) for name in ("a", "b")})
    statistics = {"pruned_error": {"a": torch.tensor([1e-9, 2e-9, 3e-9]), "b": torch.tensor([0.1, 0.5, 0.9])}}
    targets = find_targets(net)
    chosen = sensitivity("layer").sparsities(targets, 0.5, statistics)
    assert (float(chosen["a"]), float(chosen["b"])) == (0.8, 0.2)
    assert set(sensitivity("layer").sparsities(targets, 0.9, statistics).values()) == {0.9}


def test_the_sum_of_errors_of_a_network_falls_with_it():
    """By hand, with no interpolation: all layers pruned at the same count of zeros."""
    net, inputs = network()
    with torch.no_grad():
        net.layers[0][0].weight *= 20  # one block carries the output
    changed = {}
    for name in ("Uniform", "Sensitivity"):
        pruned = copy.deepcopy(net)
        report = prune(pruned, sparsity=0.5, allocation=name, inputs=inputs)
        changed[name] = sum(float(((pruned(x) - net(x)) ** 2).sum()) for x in inputs)
        assert report.pruned == math.floor(0.5 * report.weights + 0.5)
    assert changed["Sensitivity"] < 0.5 * changed["Uniform"]


@pytest.mark.parametrize("criterion", ["Magnitude", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("order", ["one_pass", "sequential"])
def test_every_criterion_and_order(criterion, order):
    net, inputs = network()
    options = {"sparsity": 0.4, "criterion": criterion, "order": order, "allocation": sensitivity("layer")}
    report = prune(net, inputs=inputs, **options)
    assert report.pruned == math.floor(0.4 * report.weights + 0.5)
    assert len({layer.pruned / layer.weights for layer in report.layers}) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": "head"}, "Unknown unit 'head'"),
        ({"read_at": "end"}, "Unknown read_at 'end'. Choices: output, prediction"),
        ({"levels": [0.5]}, "levels is [0.5]: give ascending shares"),
        ({"levels": [0.7, 0.3]}, "levels is [0.7, 0.3]: give ascending shares"),
        ({"levels": [30, 50]}, "for 30 %, write 0.3"),
        ({"samples": 0}, "samples is 0: give 1 or more"),
        ({"steps": 0}, "steps is 0: give 1 or more"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(InputError) as caught:
        Sensitivity(**options)
    assert words in str(caught.value)


def test_a_module_alone_has_no_prediction_behind_it():
    net, inputs = network()
    with pytest.raises(InputError, match="read_at is prediction, and a module alone has no denoiser behind it"):
        prune(net, sparsity=0.5, allocation=Sensitivity(read_at="prediction"), inputs=inputs)


# --- a pipeline -----------------------------------------------------------------------------------------------

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SMALL = "{class_path: Sensitivity, init_args: {levels: [0.3, 0.8], samples: 2, steps: 2}}"
FEW = [
    "--model.prune.text_encoder.sparsity=0", "--model.prune.unet.include=['*attn1.to_q', '*attn2.to_v']",
    f"--model.prune.unet.allocation={SMALL}",
]  # fmt: skip


def measured(output, statistic="pruned_error"):
    (directory,) = (output / "statistics").glob(f"unet-{statistic}-*")
    return {layer: value for file in directory.glob("*.safetensors") for layer, value in load_file(file).items()}


def test_errors_of_a_denoiser_are_those_of_its_guided_prediction(sdprune, tmp_path):
    """On the inputs that it has in the dense model, each prompt at one of the steps in the middle of equal parts."""
    from sdprune.mini.source import EmbeddedWorld
    from sdprune.pipelines import Sampling, StableDiffusion
    from sdprune.pipelines.sampling import image_seed

    told = sdprune(*fit("prune", tmp_path, *FEW, "--model.sampling.steps=4"))
    assert (told.code, told.err) == (0, "")
    model, calls = StableDiffusion("miniature"), []
    model.load(torch.float32, torch.device("cpu"))
    unet = model.components["unet"]
    hook = unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    captions, seeds = list(source.load()["caption"])[:2], [image_seed(0, f"calibration:{i}") for i in range(2)]
    model.generate(captions, seeds, Sampling(steps=4, guidance=2.5), decode=False)
    hook.remove()

    def predictions():
        outputs = [unet(*args, **{**kwargs, "return_dict": False})[0] for args, kwargs in (calls[1], calls[3])]
        return [(out[i] + 2.5 * (out[2 + i] - out[i])).flatten() for i, out in enumerate(outputs)]

    with torch.no_grad():
        dense, weight = predictions(), unet.get_submodule(LAYER).weight
        original = weight.clone()
        for level, found in zip((0.3, 0.8), measured(tmp_path, "alone_error")[LAYER].tolist(), strict=True):
            weight.copy_(lowest(original, level))
            ratios = [
                float((new - old).square().sum() / old.square().sum())
                for new, old in zip(predictions(), dense, strict=True)
            ]
            assert found == pytest.approx(sum(ratios) / 2, rel=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_text_encoders_are_measured_by_what_the_denoiser_reads(sdprune, tmp_path, guidance):
    """Guided, that is the empty prompt beside each other one."""
    options = [
        "--model.prune.unet.sparsity=0", f"--model.sampling.guidance={guidance}",
        f"--model.prune.text_encoder.allocation={SMALL}", "--model.prune.text_encoder.include=['*0.self_attn.q_proj']",
    ]  # fmt: skip
    told = sdprune(*fit("prune", tmp_path, *options))
    assert (told.code, told.err) == (0, "")
    from sdprune.mini.source import EmbeddedWorld
    from sdprune.pipelines import StableDiffusion

    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    (file,) = (tmp_path / "statistics").glob("text_encoder-alone_error-*/*.safetensors")
    ((name, errors),) = load_file(file).items()
    tokenizer, encoder = model.tokenizers["tokenizer"], model.components["text_encoder"]
    ids = tokenizer(
        [*list(source.load()["caption"])[:2], ""], padding="max_length", max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids  # fmt: skip

    def read():
        one, other, empty = encoder(ids)[0]
        return [torch.cat([own, empty] if guidance > 1 else [own]) for own in (one, other)]

    with torch.no_grad():
        dense, weight = read(), encoder.get_submodule(name).weight
        original = weight.clone()
        for level, found in zip((0.3, 0.8), errors.tolist(), strict=True):
            weight.copy_(lowest(original, level))
            change = [(now - own).square().sum() / own.square().sum() for now, own in zip(read(), dense, strict=True)]
            assert found == pytest.approx(float(sum(change)) / 2, rel=1e-3)


def noting(monkeypatch, seen, most=math.inf):
    """Note the layers of each unit that is measured; the run dies before it measures more than so many."""

    def counting(self, members, dense):
        if len(seen) == most:
            raise RuntimeError("killed")
        seen.append([target.name for target in members])
        return MEASURE(self, members, dense)

    monkeypatch.setattr(Measurement, "_of", counting)


def test_measurements_are_kept_and_go_on_where_they_stopped(sdprune, tmp_path, monkeypatch):
    seen = []
    noting(monkeypatch, seen, most=3)
    assert sdprune(*fit("prune", tmp_path, *FEW)).code == 1
    first = list(seen)
    noting(monkeypatch, seen)
    assert sdprune(*fit("prune", tmp_path, *FEW)).code == 0
    layers = [name for names in seen for name in names]
    assert len(first) == 3
    assert len(layers) == len(set(layers)) == len(measured(tmp_path))
    seen.clear()
    told = sdprune(*fit("prune", tmp_path, *FEW, "--model.prune.unet.sparsity=0.7"))  # another sparsity
    assert (told.code, seen) == (0, [])
    monkeypatch.undo()
    assert sdprune(*fit("prune", tmp_path / "whole", *FEW)).code == 0
    whole = measured(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in measured(tmp_path).items())


def test_two_processes_measure_the_same(sdprune, tmp_path):
    command = predict(tmp_path / "two", *FEW, "--trainer.devices=2", "--trainer.strategy=ddp")
    done = process(command)
    assert (done.returncode, done.stderr) == (0, "")
    told = sdprune(*predict(tmp_path / "one", *FEW))
    assert (told.code, told.err) == (0, "")
    assert "layers" in told.out
    one, two = (measured(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    hashes = [
        json.loads((the_run(tmp_path / name, "unet") / "results.json").read_text())["pruning"]["unet"]["mask_hash"]
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1]
