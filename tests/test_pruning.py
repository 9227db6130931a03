"""The specification, the criteria and allocations, and `prune` as a whole."""

import copy
import json
import math
from fractions import Fraction

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

import sdprune.pruning
from sdprune import prune
from sdprune.errors import InputError
from sdprune.pruning import (
    OWL,
    Allocation,
    Criterion,
    InputNorm,
    Magnitude,
    PerLayer,
    PruneSpec,
    Ranking,
    Reconstruction,
    Wanda,
    find_targets,
    masks,
)
from sdprune.schema import choices_of


def packaged(base):
    return [cls for cls in choices_of([base]).values() if cls.__module__.startswith("sdprune.")]


CRITERIA, ALLOCATIONS = packaged(Criterion), packaged(Allocation)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"down_blocks": nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)]), "out": nn.Linear(8, 4)})


class Statistics(dict):
    """Plausible values of any statistic, of 3 denoising steps; a new one must be added here with it."""

    def __init__(self, net):
        inputs = {t.name: torch.rand(3, 20, t.matrix.shape[1]) for t in find_targets(net)}
        self["input_norm"] = {name: x.square().sum(1, keepdim=True) for name, x in inputs.items()}
        self["hessian"] = {name: (x[0].T @ x[0])[None] for name, x in inputs.items()}
        self["pruned_error"] = {name: torch.rand(5, dtype=torch.float64).cumsum(0) ** 3 for name in inputs}


def test_everything_in_the_package_is_found():
    assert {"Magnitude", "Wanda", "SparseGPT"} <= {cls.__name__ for cls in CRITERIA}
    assert {"Uniform", "OWL", "GlobalRanking", "PerLayer"} <= {cls.__name__ for cls in ALLOCATIONS}
    for cls in CRITERIA + ALLOCATIONS:
        assert getattr(sdprune.pruning, cls.__name__) is cls


@pytest.mark.parametrize("cls", [cls for cls in CRITERIA if issubclass(cls, Ranking)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_ranking_scores_without_touching_the_weight(net, cls, dtype):
    net.to(dtype)
    statistics = Statistics(net)
    for target in find_targets(net):
        before = target.matrix.clone()
        own = {name: statistics[name][target.name][0, 0] for name in cls.statistics}
        scores = cls().score(target.matrix, own)
        assert scores.shape == before.shape
        assert scores.is_floating_point()
        assert (scores >= 0).all()
        assert torch.equal(scores, cls().score(target.matrix, own))
        assert torch.equal(target.matrix, before)
        if cls.rowwise:
            assert torch.equal(scores[1:3], cls().score(target.matrix[1:3], own))


@pytest.mark.parametrize("cls", [cls for cls in CRITERIA if issubclass(cls, Reconstruction)])
def test_every_reconstruction_prunes_what_is_picked_and_touches_nothing(net, cls):
    for target in find_targets(net):
        before, seen = target.matrix.clone(), []
        own = {name: Statistics(net)[name][target.name][0] for name in cls.statistics}
        kept = {name: value.clone() for name, value in own.items()}

        def pick(scores, start, stop, seen=seen):
            seen.append((start, stop))
            return scores <= scores.median()

        widths = [3] * (target.shape[1] // 3) + [target.shape[1] % 3] * (target.shape[1] % 3 > 0)
        mask, weight, _ = cls().reconstruct(target.matrix, own, pick, widths)
        assert [stop - start for start, stop in seen] == widths
        assert torch.equal(weight == 0, mask)
        assert torch.equal(target.matrix, before)
        assert all(torch.equal(own[name], value) for name, value in kept.items())


@pytest.mark.parametrize("cls", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.35, 0.5, 0.99, 1.0])
def test_every_allocation_keeps_the_overall_sparsity(net, cls, sparsity):
    targets = find_targets(net)
    stored = Statistics(net)["input_norm"]
    norms = {name: InputNorm.read(name, stored[name], "uniform") for name in stored}
    errors = Statistics(net)["pruned_error"]
    got = cls().sparsities(targets, sparsity, {"input_norm": norms, "pruned_error": errors})
    assert list(got) == [target.name for target in targets]
    assert all(0 <= share <= 1 for share in got.values())
    sizes = {target.name: target.weight.numel() for target in targets}
    total = sum(sizes.values())  # a ranking gives whole numbers of weights
    assert sum(got[name] * size for name, size in sizes.items()) == pytest.approx(sparsity * total, abs=0.5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("granularity", ["layer", "row", "column_block", "module_block"])
def test_every_combination_prunes_what_was_asked(net, criterion, allocation, granularity):
    if issubclass(criterion, Reconstruction) and granularity != "column_block":
        with pytest.raises(InputError, match=f"{criterion.__name__} is not defined for granularity {granularity}"):
            PruneSpec(0.3, criterion=criterion(), granularity=granularity)
        return
    spec = PruneSpec(0.3, criterion=criterion(), allocation=allocation(), granularity=granularity, block_width=3)
    report = prune(net, spec, Statistics(net))
    groups = len({layer.block if granularity == "module_block" else layer.name for layer in report.layers})
    assert abs(report.pruned - 0.3 * report.weights) <= groups / 2
    assert report.zeros == report.pruned
    if allocation.__name__ != "Uniform":
        assert report.pruned == math.floor(0.3 * report.weights + 0.5)
    assert json.loads(json.dumps(report.spec)) == spec.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wanda_is_its_formula(net, dtype):
    weight = torch.randn(6, 8).to(dtype)
    squared = torch.rand(8)
    squared[3] = 0
    scores = Wanda().score(weight, {"input_norm": squared})
    assert scores.dtype == torch.float32
    for i in range(6):
        for j in range(8):
            assert scores[i, j].item() == pytest.approx(abs(weight[i, j].item()) * math.sqrt(squared[j].item()))
    assert not scores[:, 3].any()


def test_wanda_refuses_statistics_of_another_shape(net):
    statistics = Statistics(net)
    statistics["input_norm"]["out"] = torch.ones(1, 1, 5)
    with pytest.raises(InputError, match=r"\[5\].*\[4, 8\]"):
        prune(net, PruneSpec(0.5, criterion=Wanda()), statistics)


@pytest.mark.parametrize("missing", ["statistic", "layer"])
def test_missing_statistics_name_the_layer_before_anything_is_pruned(net, missing):
    statistics = Statistics(net)
    del statistics["input_norm"]["out"]
    with pytest.raises(InputError, match=r"Wanda needs the statistic input_norm of layer '(out|down_blocks\.0)'"):
        prune(net, PruneSpec(0.5, criterion=Wanda()), None if missing == "statistic" else statistics)
    assert all(parameter.all() for parameter in net.parameters())


def test_nan_statistics_name_the_layer(net):
    statistics = Statistics(net)
    statistics["input_norm"]["out"][0, 0, 2] = math.nan
    with pytest.raises(InputError, match=r"'out' has NaN scores"):
        prune(net, PruneSpec(0.5, criterion=Wanda(), granularity="component"), statistics)


def test_sparsity_0_touches_nothing_needs_nothing_and_reports(net):
    with torch.no_grad():
        net["out"].weight[0, 0] = -0.0
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in net.parameters()]
    report = prune(net, PruneSpec(criterion=Wanda()))
    for parameter, (pointer, version, old) in zip(net.parameters(), before, strict=True):
        assert (parameter.data_ptr(), parameter._version) == (pointer, version)
        assert torch.equal(torch.signbit(parameter), torch.signbit(old))
    assert (report.weights, report.pruned, report.zeros) == (48 + 48 + 32, 0, 1)


class Ramp(Allocation):
    """Earlier layers lose more: 0.9, 0.5, 0.1 and so on, whatever the mean."""

    explicit = True

    def sparsities(self, targets, sparsity, statistics):
        return {target.name: 0.9 - 0.4 * i for i, target in enumerate(targets)}


class Implicit(Ramp):
    """The same, to be shared out in one count."""

    explicit = False


def test_unequal_sparsities_share_one_count_by_largest_remainder():
    # Quotas 4.5, 2.5 and 0.5 add up to 7.5, which rounds to 8: of three equal remainders the first two are rounded up.
    net = nn.Sequential(nn.Linear(5, 1), nn.Linear(5, 1), nn.Linear(5, 1))
    assert [layer.pruned for layer in prune(net, PruneSpec(0.5, allocation=Implicit())).layers] == [5, 3, 0]


def test_sparsities_that_miss_the_overall_one_are_refused(net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=r"Implicit prunes 70\.4 weights where sparsity 0\.5 means 64.*`explicit`"):
        prune(net, PruneSpec(0.5, allocation=Implicit()))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_explicit_sparsities_are_exact_layer_by_layer(net):
    report = prune(net, PruneSpec(0.5, allocation=Ramp()))
    assert [layer.pruned for layer in report.layers] == [43, 24, 3]
    net = nn.Sequential(nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1))
    assert [layer.pruned for layer in prune(net, PruneSpec(0.5, allocation=Ramp())).layers] == [3, 2, 0]
    for written in ({"*": 0.25}, {"0": 0.25, "1": 0.25}):
        net = nn.Sequential(nn.Linear(5, 2), nn.Linear(5, 2))
        assert [layer.pruned for layer in prune(net, allocation=PerLayer(written)).layers] == [3, 3]


@pytest.mark.parametrize("sparsity", [0.1, 0.145, 0.3, 0.35, 0.7, 0.9])
@pytest.mark.parametrize("sizes", [[5] * 40, [5, 15, 25] * 20, [15, 5] * 30, [7, 13, 20, 1, 10] * 9])
def test_equal_remainders_go_to_earlier_layers(sparsity, sizes):
    net = nn.Sequential(*(nn.Linear(size, 1) for size in sizes))
    norms = {"input_norm": {t.name: torch.ones(1, 1, t.shape[1]) for t in find_targets(net)}}
    report = prune(net, PruneSpec(sparsity, allocation=OWL(m=1e9)), norms)  # no outliers: uniform
    quotas = [size * Fraction(str(sparsity)) for size in sizes]
    counts = [math.floor(quota) for quota in quotas]
    wanted = math.floor(sum(sizes) * sparsity + 0.5)
    while sum(counts) < wanted:
        best = max(range(len(sizes)), key=lambda i: (quotas[i] - counts[i], -i))
        counts[best] += 1
    assert [layer.pruned for layer in report.layers] == counts


@pytest.mark.parametrize("granularity", ["row", "column_block"])
def test_rows_and_blocks_share_their_layers_own_count(net, granularity):
    report = prune(net, PruneSpec(0.5, allocation=Ramp(), granularity=granularity, block_width=3))
    assert [layer.pruned for layer in report.layers] == [43, 24, 3]


def test_the_mask_hash_tells_masks_apart_and_nothing_else(net):
    def digest(**options):
        targets = find_targets(net)
        torch.manual_seed(1)
        copy = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)]), "out": nn.Linear(8, 4)})
        copy.load_state_dict(net.state_dict())
        assert len(targets) == 3
        return prune(copy, PruneSpec(**options)).mask_hash

    assert digest(sparsity=0.5) == digest(sparsity=0.5, granularity="column_block", block_width=99)
    assert digest(sparsity=1.0) == digest(sparsity=1.0, granularity="module_block")
    assert len({digest(sparsity=s) for s in (0.0, 0.02, 0.5, 0.6)}) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": 1.01}, "between 0 and 1"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"band": (0.4, 0.2)}, "below its second"),
        ({"band": (0.4, 0.4)}, "below its second"),
        ({"band": (0.4, 1.2)}, "band is 1.2"),
        ({"band": (math.nan, 0.2)}, "band is nan"),
        ({"band": (0.1,)}, "two shares"),
        ({"band": (0.1, 0.2), "sparsity": 0.5}, "exclude each other"),
        ({"band": (0.1, 0.2), "allocation": Ramp()}, "Ramp has no effect under a band"),
        ({"granularity": "component", "allocation": Ramp()}, "no effect under granularity component"),
        ({"granularity": "rows"}, "'rows'.*Did you mean 'row'"),
        ({"criterion": "Magnitud"}, "Unknown criterion 'Magnitud'. Did you mean 'Magnitude'"),
        ({"allocation": "Unifrm"}, "Unknown allocation 'Unifrm'. Did you mean 'Uniform'"),
        ({"block_width": 0}, "block_width is 0"),
        ({"layers": ["Linaer"]}, "Unknown layer kind 'Linaer'"),
        ({"layers": []}, "layers is empty"),
        ({"include": "*attn*"}, "give a list"),
    ],
)
def test_bad_choices_are_told_in_one_line(options, words):
    with pytest.raises(InputError, match=words) as error:
        PruneSpec(**options)
    assert "\n" not in str(error.value)


def test_describe_is_canonical():
    one = PruneSpec(0.5, include=["b", "a"], layers=["Linear", "Conv2d"], block_width=7).describe()
    assert one == PruneSpec(0.5, include=["a", "b"], layers=["Conv2d", "Linear"]).describe()
    assert one["criterion"] == {"class": "Magnitude", "options": {}}
    assert PruneSpec(1).describe() == PruneSpec(1.0).describe()
    assert PruneSpec(granularity="column_block", block_width=7).describe()["block_width"] == 7
    assert json.loads(json.dumps(one)) == one


def test_describe_tells_options_apart():
    class Power(Magnitude):
        """Magnitude with an option."""

        def __init__(self, power: float = 1.0) -> None:
            self.power = power

    described = PruneSpec(criterion=Power(power=2.0)).describe()["criterion"]
    assert (described["class"], described["options"]) == ("Power", {"power": 2.0})


class Model:
    """What a configuration file configures."""

    def __init__(self, prune: dict[str, PruneSpec]) -> None:
        self.prune = prune


def test_dotted_options_on_top_of_a_file_round_trip(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Model, "model")
    config = tmp_path / "config.yaml"
    config.write_text("model: {prune: {unet: {}, text_encoder: {sparsity: 0.2, layers: [Linear, Conv2d]}}}")
    options = ["sparsity=0.35", "criterion=Wanda", "allocation=Uniform", "granularity=row"]
    arguments = [f"--config={config}", *(f"--model.prune.unet.{option}" for option in options)]
    arguments.append("--model.prune.text_encoder.criterion=Wanda")
    dumped = parser.dump(parser.parse_args(arguments))
    config.write_text(dumped)
    read = parser.parse_args([f"--config={config}"])
    assert parser.dump(read) == dumped
    specs = parser.instantiate_classes(read).model.prune
    wanted = {
        "unet": PruneSpec(0.35, criterion="Wanda", granularity="row"),
        "text_encoder": PruneSpec(0.2, criterion="Wanda", layers=["Linear", "Conv2d"]),
    }
    assert {name: spec.describe() for name, spec in specs.items()} == {n: s.describe() for n, s in wanted.items()}


def test_every_granularity_is_deterministic_across_the_order_of_calls(net):
    targets = find_targets(net)
    for granularity in ("layer", "row", "column_block", "module_block", "component", "2:4"):
        spec = PruneSpec(0.5, granularity=granularity)
        first = {target.name: mask for target, mask in masks(targets, spec)}
        assert all(torch.equal(mask, first[target.name]) for target, mask in masks(targets, spec))


@pytest.mark.parametrize(
    ("score", "found"),
    [
        (lambda weight: weight.abs().mean(0), r"\[6\]"),
        (lambda weight: weight.abs().T, r"\[6, 4\]"),
        (lambda weight: None, "NoneType"),
    ],
)
def test_a_users_scores_of_another_shape_are_named(score, found):
    class Own(Magnitude):
        def score(self, weight, statistics):
            return score(weight)

    with pytest.raises(InputError, match=rf"Own scores layer '0' with {found}: .* shape \[4, 6\]"):
        sdprune.prune(nn.Sequential(nn.Linear(6, 4)), sparsity=0.5, criterion=Own())
