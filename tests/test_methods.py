"""SparseGPT, OWL, N:M, convolutions and the `original` mode against loops over numbers, through `prune`."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sdprune import gather, prune
from sdprune.calibration.passes import plan_passes
from sdprune.errors import InputError
from sdprune.pruning import OWL, GlobalRanking, PerLayer, PruneSpec, SparseGPT, apply, find_targets, masks, statistic
from sdprune.runs.label import label

LAYERS = {
    "linear": lambda: nn.Linear(11, 8),
    "1x1": lambda: nn.Conv2d(10, 6, 1),
    "3x3": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2),
}


def inputs_for(layer, dead=False):
    shape = (40, layer.in_features) if isinstance(layer, nn.Linear) else (3, layer.in_channels, 7, 8)
    x = torch.randn(shape) + 0.3
    if dead:
        x[:, 1] = 0
    return x


def columns_of(layer, x):
    """[groups][positions][columns], by plain slicing of the padded input."""
    if isinstance(layer, nn.Linear):
        return [x.tolist()]
    x = nn.functional.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    size = layer.in_channels // layer.groups
    found = [[] for _ in range(layer.groups)]
    for image in x:
        for top in range(0, image.shape[1] - dh * (kh - 1), sh):
            for left in range(0, image.shape[2] - dw * (kw - 1), sw):
                window = image[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
                for group in range(layer.groups):
                    found[group].append(window[group * size : (group + 1) * size].flatten().tolist())
    return found


def wanda_scores(layer, x):
    weight = layer.weight.detach().flatten(1)
    per_group = [torch.tensor(rows).square().sum(0).sqrt() for rows in columns_of(layer, x)]
    size = len(weight) // len(per_group)
    return torch.stack([row.abs() * per_group[i // size] for i, row in enumerate(weight)])


def lowest(scores, k):
    """Flat indices of the k lowest, the earlier one first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return set(order[:k])


def shares(k, sizes):
    quotas = [k * size / sum(sizes) for size in sizes]
    got = [int(q) for q in quotas]
    for i in sorted(range(len(sizes)), key=lambda i: got[i] - quotas[i])[: k - sum(got)]:
        got[i] += 1
    return got


@pytest.fixture
def layer(request):
    torch.manual_seed(3)
    return nn.Sequential(LAYERS[request.param]())


every_layer = pytest.mark.parametrize("layer", LAYERS, indirect=True)


# --- Wanda ----------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_wanda(layer, sparsity, granularity):
    x = inputs_for(layer[0], dead=True)
    before = layer[0].weight.detach().clone()
    scores = wanda_scores(layer[0], x)
    kinds = ["Linear"] if isinstance(layer[0], nn.Linear) else ["Conv2d"]
    report = prune(layer, sparsity=sparsity, criterion="Wanda", granularity=granularity, layers=kinds, inputs=[x])
    k = math.floor(scores.numel() * sparsity + 0.5)
    assert report.pruned == k
    now = layer[0].weight.detach().flatten(1)
    rows, columns = scores.shape
    if granularity == "layer":
        gone = lowest(scores.flatten().tolist(), k)
    else:
        counts = shares(k, [columns] * rows)
        gone = {i * columns + j for i in range(rows) for j in lowest(scores[i].tolist(), counts[i])}
    flat, old = now.flatten().tolist(), before.flatten().tolist()
    assert all(flat[i] == (0 if i in gone else old[i]) for i in range(len(flat)))


# --- SparseGPT ------------------------------------------------------------------------------------------------


def naive_sparsegpt(weight, positions, samples, choose, widths, damping=0.01):
    """Optimal Brain Surgeon column by column: the inverse Hessian is eliminated one column at a time, in float64.

    diag(U)_j^2 of the Cholesky factor of H^-1 is the j-th diagonal of the inverse after j eliminations. The weights
    of an input that is always 0 score 0.
    """
    weight = weight.double().clone()
    x = torch.tensor(positions, dtype=torch.float64)
    hessian = 2 / samples * x.T @ x
    dead = hessian.diagonal() == 0
    for j in range(len(hessian)):
        if dead[j]:
            hessian[j, j] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    diagonals, rows = [], []
    for j in range(len(inverse)):
        diagonals.append(inverse[j, j].item())
        rows.append(inverse[j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    start = 0
    for number, width in enumerate(widths):
        stop = start + width
        scores = weight[:, start:stop].square() / torch.tensor(diagonals[start:stop])
        for j in range(start, stop):
            if dead[j]:
                scores[:, j - start] = 0
        mask[:, start:stop] = choose(scores, number)
        for j in range(start, stop):
            for i in range(len(weight)):
                if mask[i, j]:
                    error = weight[i, j].item() / diagonals[j]
                    weight[i, j:] -= error * rows[j][j:]
                    weight[i, j] = 0
        start = stop
    return mask, weight


def choose_block(counts):
    def choose(scores, number):
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[list(lowest(scores.flatten().tolist(), counts[number]))] = True
        return mask.view(scores.shape)

    return choose


@every_layer
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.8, 1.0])
def test_sparsegpt(layer, sparsity, dead):
    module = layer[0]
    x = inputs_for(module, dead)
    before = module.weight.detach().flatten(1).clone()
    kinds = ["Linear"] if isinstance(module, nn.Linear) else ["Conv2d"]
    report = prune(layer, sparsity=sparsity, criterion="SparseGPT", block_width=4, layers=kinds, inputs=[x])
    now = module.weight.detach().flatten(1)
    k = math.floor(before.numel() * sparsity + 0.5)
    assert report.pruned == k
    if sparsity == 0:
        assert torch.equal(now, before)
        return
    columns, groups = before.shape[1], getattr(module, "groups", 1)
    widths = [min(4, columns - start) for start in range(0, columns, 4)]
    counts = shares(k, [len(before) * width for width in widths])
    size = len(before) // groups
    for group, positions in enumerate(columns_of(module, x)):
        part = slice(group * size, (group + 1) * size)
        own = [shares(count, [size] * groups)[group] for count in counts]
        mask, wanted = naive_sparsegpt(before[part], positions, len(x), choose_block(own), widths)
        assert not now[part][mask].any()
        torch.testing.assert_close(now[part].double(), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["linear", "3x3", "1x1", "grouped"])
def test_sparsegpt_n_of_m(name):
    torch.manual_seed(4)
    layer = nn.Sequential(LAYERS[name]())
    module, n, m = layer[0], 1, 3
    x = inputs_for(module)
    before = module.weight.detach().clone()
    kinds = ["Linear"] if isinstance(module, nn.Linear) else ["Conv2d"]
    prune(layer, sparsity=n / m, granularity=f"{n}:{m}", criterion="SparseGPT", layers=kinds, inputs=[x])
    channels = before.shape[1]
    positions = before[0, 0].numel()
    order = [c * positions + p for p in range(positions) for c in range(channels)]
    widths = [min(m, channels - start) for start in range(0, channels, m)] * positions

    def choose(scores, number):
        mask = torch.zeros(scores.shape, dtype=torch.bool)
        if scores.shape[1] == m:
            for i, row in enumerate(scores.tolist()):
                mask[i, list(lowest(row, n))] = True
        return mask

    groups = getattr(module, "groups", 1)
    size = len(before) // groups
    now = module.weight.detach().flatten(1)
    for group, seen in enumerate(columns_of(module, x)):
        part = slice(group * size, (group + 1) * size)
        reordered = [[row[c] for c in order] for row in seen]
        mask, wanted = naive_sparsegpt(before.flatten(1)[part][:, order], reordered, len(x), choose, widths)
        assert not now[part][:, order][mask].any()
        torch.testing.assert_close(now[part][:, order].double(), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("sparsity", "granularity"), [(0.1, "column_block"), (0.5, "column_block"), (0.25, "1:4")])
def test_sparsegpt_counts_dead_columns_and_spares_those_that_are_not_pruned(dtype, sparsity, granularity):
    torch.manual_seed(8)
    net, x = nn.Sequential(nn.Linear(8, 9)).to(dtype), torch.randn(40, 8).to(dtype)
    x[:, [1, 2, 6]] = 0
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        before[0, 1] = net[0].weight[0, 1] = 1e-30  # bits that a rounding would lose
    report = prune(net, sparsity=sparsity, granularity=granularity, block_width=4, criterion="SparseGPT", inputs=[x])
    now = net[0].weight.detach()
    counts = shares(math.floor(72 * sparsity + 0.5), [36, 36])
    assert report.pruned == report.zeros == int((now == 0).sum()) == sum(counts)
    for start, count in zip((0, 4), counts, strict=True):
        dead = [(i, j) for i in range(9) for j in range(start, start + 4) if j in (1, 2, 6)]
        gone = [(i, j) for i in range(9) for j in range(start, start + 4) if now[i, j] == 0]
        assert len(gone) == count
        if granularity == "1:4":
            assert gone == [(i, {0: 1, 4: 6}[start]) for i in range(9)]
        else:
            assert set(gone) >= set(dead[:count])
        assert all(now[i, j] == before[i, j] for i, j in dead if (i, j) not in gone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_sparsegpt_at_0_leaves_a_layer_to_the_bit(dtype):
    torch.manual_seed(8)
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype), torch.randn(30, 6).to(dtype)
    x[:, 2] = 0
    with torch.no_grad():
        net[0].weight[1, 1] = -0.0
    before = net[0].weight.detach().clone()
    report = prune(net, sparsity=0.5, criterion="SparseGPT", allocation=PerLayer({"0": 0.0}), inputs=[x])
    assert [layer.pruned for layer in report.layers] == [0, 10]
    assert torch.equal(net[0].weight, before)
    assert torch.equal(net[0].weight.signbit(), before.signbit())


@pytest.mark.parametrize("granularity", ["column_block", "1:4"])
def test_original_sparsegpt_zeroes_dead_columns_and_says_so(granularity):
    torch.manual_seed(8)
    net, x = nn.Sequential(nn.Linear(8, 9)), torch.randn(40, 8)
    x[:, [1, 2, 6]] = 0
    (layer,) = prune(
        net, sparsity=0.25, granularity=granularity, criterion="SparseGPT", mode="original", inputs=[x]
    ).layers
    now = net[0].weight.detach()
    assert not now[:, [1, 2, 6]].any()
    assert layer.notes == {"dead_columns": 3}
    assert layer.pruned == layer.zeros == int((now == 0).sum()) == 27  # beyond int(72 * 0.25) + 1, and 2 * 9


def test_sparsegpt_leaves_outputs_closer_than_magnitude_and_wanda():
    torch.manual_seed(0)
    x = torch.randn(500, 8) @ torch.randn(8, 32) + 0.3 * torch.randn(500, 32)  # inputs that go together
    dense = nn.Sequential(nn.Linear(32, 24))
    wanted, errors = dense(x), {}
    for criterion in ("Magnitude", "Wanda", "SparseGPT"):
        net = copy.deepcopy(dense)
        prune(net, sparsity=0.5, criterion=criterion, inputs=[x])
        errors[criterion] = (net(x) - wanted).square().mean().item()
    assert errors["SparseGPT"] < 0.6 * errors["Wanda"]
    assert errors["Wanda"] < 1.1 * errors["Magnitude"]


def test_sparsegpt_in_half_precision_keeps_its_zeros():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8)).half(), torch.randn(64, 16).half()
    report = prune(net, sparsity=0.5, criterion="SparseGPT", inputs=[x])
    assert net[0].weight.dtype == torch.float16
    assert report.zeros == report.pruned == 64


def test_a_hessian_that_cannot_be_factorised_is_damped_more_and_the_report_says_so():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4))
    statistics = {"hessian": {"0": -torch.eye(6)[None] * torch.tensor([1.0, 1, 1, 1, 1, -20])}}
    report = prune(net, PruneSpec(0.5, criterion="SparseGPT"), statistics)
    assert report.layers[0].notes["damping"] > 0.01
    assert report.pruned == 12
    assert (
        prune(net, PruneSpec(0.5, criterion="SparseGPT"), {"hessian": {"0": torch.eye(6)[None]}}).layers[0].notes == {}
    )


def test_a_hopeless_hessian_is_refused():
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InputError, match="cannot be factorised"):
        prune(net, PruneSpec(0.5, criterion=SparseGPT()), {"hessian": {"0": torch.full((1, 3, 3), math.nan)}})


# --- OWL and other allocations --------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Three blocks of unequal sizes, run one after another, and a layer outside of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        sizes = [(12, 12), (12, 30), (30, 12)]
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(i, o), nn.Linear(o, o)]) for i, o in sizes)
        self.out = nn.Linear(12, 5)
        with torch.no_grad():
            self.layers[1][0].weight[:3] *= 9
            self.layers[2][1].weight[0] *= 30

    def forward(self, x):
        for first, second in self.layers:
            x = second(first(x).relu())
        return self.out(x)


def blocks_and_inputs():
    net = Blocks()
    return net, [torch.randn(7, 12), torch.randn(4, 12)]


def naive_outliers(net, batches, m):
    """D by block, from inputs recorded by hand."""
    seen = {}
    hooks = [
        t.module.register_forward_hook(lambda mod, args, out, n=t.name: seen.setdefault(n, []).append(args[0]))
        for t in find_targets(net)
    ]
    for batch in batches:
        net(batch)
    for hook in hooks:
        hook.remove()
    by_block = {}
    for target in find_targets(net):
        norms = torch.cat(seen[target.name]).double().square().sum(0) / sum(map(len, batches))
        scores = [
            abs(w) * math.sqrt(s) for row in target.matrix.tolist() for w, s in zip(row, norms.tolist(), strict=True)
        ]
        by_block.setdefault(target.block, []).extend(scores)
    return {
        block: 100 * sum(a > m * sum(scores) / len(scores) for a in scores) / len(scores)
        for block, scores in by_block.items()
    }


@pytest.mark.parametrize("criterion", ["Magnitude", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_owl(criterion, sparsity):
    net, batches = blocks_and_inputs()
    outliers = naive_outliers(net, batches, 3)
    assert len(set(outliers.values())) == 4
    sizes = {}
    for target in find_targets(net):
        sizes[target.block] = sizes.get(target.block, 0) + target.weight.numel()
    low, high = min(outliers.values()), max(outliers.values())
    d = {block: (value - low) / (high - low) * 2 * 0.08 for block, value in outliers.items()}
    mean = sum(d[block] * size for block, size in sizes.items()) / sum(sizes.values())
    report = prune(net, sparsity=sparsity, criterion=criterion, allocation=OWL(m=3), inputs=batches)
    assert report.pruned == math.floor(report.weights * sparsity + 0.5)
    for layer in report.layers:
        assert layer.pruned == pytest.approx(layer.weights * (sparsity - d[layer.block] + mean), abs=1.01)


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.02, 0.98, 1.0])
def test_owl_at_the_limits_makes_up_for_what_it_cuts_off(sparsity):
    net, batches = blocks_and_inputs()
    report = prune(net, sparsity=sparsity, allocation=OWL(m=3, lambda_=0.3), inputs=batches)
    assert report.pruned == math.floor(report.weights * sparsity + 0.5)
    assert all(0 <= layer.pruned <= layer.weights for layer in report.layers)


def test_owl_with_equal_outliers_is_uniform():
    net, batches = blocks_and_inputs()
    report = prune(net, sparsity=0.3, allocation=OWL(m=1e9), inputs=batches)
    assert all(abs(layer.pruned - layer.weights * 0.3) < 1 for layer in report.layers)
    assert report.pruned == math.floor(report.weights * 0.3 + 0.5)


@pytest.mark.parametrize("by", ["Magnitude", "Wanda"])
def test_global_ranking_is_the_component_ranked_at_once(by):
    hashes = []
    for options in ({"allocation": GlobalRanking(by=by), "granularity": "layer"}, {"granularity": "component"}):
        net, batches = blocks_and_inputs()
        hashes.append(prune(net, sparsity=0.4, criterion=by, inputs=batches, **options).mask_hash)
    assert hashes[0] == hashes[1]


def test_per_layer_gives_what_is_written():
    net, _ = blocks_and_inputs()
    report = prune(net, sparsity=0.25, allocation=PerLayer({"layers.0.*": 0.5, "layers.*": 0.0}))
    got = {layer.name: layer.pruned / layer.weights for layer in report.layers}
    assert got == {
        "layers.0.0": 0.5, "layers.0.1": 0.5, "layers.1.0": 0, "layers.1.1": 0, "layers.2.0": 0, "layers.2.1": 0,
        "out": 0.25,
    }  # fmt: skip
    assert prune(net, allocation=PerLayer({"out": 1.0})).layers[-1].zeros == 60
    with pytest.raises(InputError, match=r"pattern 'layer\.0' matches none of the 7 layers"):
        prune(net, sparsity=0.25, allocation=PerLayer({"layer.0": 0.5}))
    with pytest.raises(InputError, match=r"has sparsity 1\.5"):
        PerLayer({"out": 1.5})


# --- N:M ------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 3), (5, 20)])
@pytest.mark.parametrize("criterion", ["Magnitude", "Wanda"])
def test_n_of_m_runs_along_channels_at_each_position_of_the_kernel(layer, n, m, criterion):
    module = layer[0]
    x = inputs_for(module)
    before = module.weight.detach().clone()
    scores = wanda_scores(module, x) if criterion == "Wanda" else before.flatten(1).abs()
    scores = scores.view(before.shape)
    kinds = ["Linear"] if isinstance(module, nn.Linear) else ["Conv2d"]
    prune(layer, sparsity=n / m, granularity=f"{n}:{m}", criterion=criterion, layers=kinds, inputs=[x])
    now = module.weight.detach()
    flat, now, scores = (t.reshape(*t.shape[:2], -1) for t in (before, now, scores))
    for i in range(flat.shape[0]):
        for p in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                group = range(start, min(start + m, flat.shape[1]))
                gone = lowest([scores[i, c, p].item() for c in group], n) if len(group) == m else set()
                for place, c in enumerate(group):
                    assert now[i, c, p] == (0 if place in gone else flat[i, c, p])


@pytest.mark.parametrize("granularity", ["2:4", "1:3", "2:3", "3:3"])
@pytest.mark.parametrize("given", ["nothing", "rounded", "exactly"])
def test_n_of_m_sets_the_sparsity_by_itself(granularity, given):
    n, m = map(int, granularity.split(":"))
    sparsity = {"nothing": None, "rounded": round(n / m, 3), "exactly": n / m}[given]
    net = nn.Sequential(nn.Linear(12, 5))
    spec = PruneSpec(sparsity=sparsity, granularity=granularity)
    assert (spec.sparsity, spec.nominal, spec.dense) == (n / m, n / m, False)
    assert spec.describe() == PruneSpec(n / m, granularity=granularity).describe()
    assert label({"unet": spec}) == f"unet-magnitude-{n}_{m}"
    report = prune(net, spec)
    assert report.nominal == n / m
    assert report.pruned == report.zeros == 5 * 12 * n // m


def test_n_of_m_at_a_given_sparsity_of_0_is_the_dense_model():
    net = nn.Sequential(nn.Linear(12, 5))
    spec = PruneSpec(0, granularity="2:4")
    assert (spec.sparsity, spec.dense) == (0, True)
    assert prune(net, spec).pruned == 0
    assert PruneSpec().sparsity == 0


# --- sequential -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["Wanda", "SparseGPT"])
@pytest.mark.parametrize("allocation", ["Uniform", "OWL"])
def test_sequential_order_prunes_every_block_on_what_the_pruned_ones_before_give(criterion, allocation):
    net, batches = blocks_and_inputs()
    by_hand = copy.deepcopy(net)
    spec = PruneSpec(0.5, criterion=criterion, allocation=allocation, order="sequential")
    one_pass = PruneSpec(0.5, criterion=criterion, allocation=allocation)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dense = gather(net, batches, one_pass, ["input_norm"])
    gathered = gather(net, batches, spec, spec.criterion.statistics, dense)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # dense again
    report = prune(net, spec, inputs=batches)
    # By hand: for each block the statistics of the model as it is by then, and only this block's part of the pruning.
    for block in ("layers.0", "layers.1", "layers.2", "stem"):
        own = gather(by_hand, batches, one_pass, spec.criterion.statistics)
        trial = copy.deepcopy(by_hand)
        trial.load_state_dict(before)
        apply(trial, one_pass, own, dense)
        for target, pruned in zip(find_targets(by_hand), find_targets(trial), strict=True):
            if target.block == block:
                target.weight.data.copy_(pruned.weight)
                for name in own:
                    assert torch.equal(own[name][target.name], gathered[name][target.name])
    for mine, hand in zip(find_targets(net), find_targets(by_hand), strict=True):
        assert torch.equal(mine.weight, hand.weight)
    assert report.pruned == math.floor(report.weights * 0.5 + 0.5)


def test_order_makes_no_difference_to_criteria_without_statistics():
    assert PruneSpec(0.5, order="sequential").describe() == PruneSpec(0.5).describe()


# --- original -------------------------------------------------------------------------------------------------


def tied():
    torch.manual_seed(6)
    net = Blocks()
    for parameter in net.parameters():
        parameter.data = (parameter.data * 8).round() / 8
    return net


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_original_magnitude_takes_all_ties(sparsity):
    net = tied()
    report = prune(net, sparsity=sparsity, mode="original")
    for layer, target in zip(report.layers, find_targets(tied()), strict=True):
        flat = target.matrix.abs().flatten()
        threshold = torch.sort(flat).values[int(flat.numel() * sparsity) - 1]
        assert layer.pruned == int((flat <= threshold).sum())
    assert report.pruned > report.weights * sparsity


def test_original_owl_magnitude_prunes_one_more():
    net, batches = blocks_and_inputs()
    outliers = naive_outliers(net, batches, 3)
    low, high = min(outliers.values()), max(outliers.values())
    d = {block: (value - low) / (high - low) * 0.16 for block, value in outliers.items()}
    mean = sum(d.values()) / len(d)
    report = prune(net, sparsity=0.5, allocation=OWL(m=3), mode="original", inputs=batches)
    for layer in report.layers:
        assert layer.pruned == int(layer.weights * (0.5 - (d[layer.block] - mean))) + 1


def test_original_wanda_prunes_so_many_of_every_row():
    net, batches = blocks_and_inputs()
    prune(net, sparsity=0.55, criterion="Wanda", mode="original", inputs=batches)
    for target in find_targets(net):
        zeros = (target.matrix == 0).sum(1)
        assert (zeros == int(target.shape[1] * 0.55)).all()


def test_original_owl_wanda_lifts_what_is_not_above_0():
    net, batches = blocks_and_inputs()
    report = prune(
        net, sparsity=0.05, criterion="Wanda", allocation=OWL(m=3, lambda_=0.2), mode="original", inputs=batches
    )
    assert 0 in [layer.pruned for layer in report.layers]  # int(12 * 0.01) = 0 of a row
    with pytest.raises(InputError, match=r"OWL gives block \S+ the sparsity -0\.\d+"):
        prune(blocks_and_inputs()[0], sparsity=0.05, allocation=OWL(m=3, lambda_=0.2), mode="original", inputs=batches)
    with pytest.raises(InputError, match="divides by 0"):
        prune(blocks_and_inputs()[0], sparsity=0.5, allocation=OWL(m=1e9), mode="original", inputs=batches)


def published_shares(outliers, sparsity, lambda_):
    """luuyin/OWL, lib/prune_all.py, line by line: D by block in percent -> sparsity by block, in float64."""
    ratio = np.array(list(outliers.values()))
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * lambda_ * 2)
    ratio = ratio - np.mean(ratio) + (1 - sparsity)
    return {block: 1 - share for block, share in zip(outliers, ratio, strict=True)}


class TwoBlocks(nn.Module):
    """Rows of 100 inputs, on which the last bit of a share like 0.7 shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(100, 100)]) for _ in range(2))
        with torch.no_grad():
            self.layers[1][0].weight[0] *= 30

    def forward(self, x):
        for (layer,) in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("sparsity", [round(0.01 * i, 2) for i in range(10, 90, 4)])
def test_original_owl_shares_are_those_of_the_published_order_of_operations(sparsity):
    net, batches = TwoBlocks(), [torch.randn(6, 100)]
    shares = published_shares(naive_outliers(net, batches, 3), sparsity, 0.08)
    report = prune(net, sparsity=sparsity, criterion="Wanda", allocation=OWL(m=3), mode="original", inputs=batches)
    assert [layer.pruned for layer in report.layers] == [
        100 * int(100 * shares[layer.block]) for layer in report.layers
    ]


def test_original_owl_sparsegpt_lifts_what_is_not_above_0():
    net, batches = blocks_and_inputs()
    shares = published_shares(naive_outliers(net, batches, 3), 0.05, 0.2)
    assert min(shares.values()) < 0
    allocation = OWL(m=3, lambda_=0.2)
    report = prune(net, sparsity=0.05, criterion="SparseGPT", allocation=allocation, mode="original", inputs=batches)
    for layer in report.layers:
        share = shares[layer.block] if shares[layer.block] > 0 else 0.01
        dead = layer.notes.get("dead_columns", 0) * net.get_submodule(layer.name).out_features  # behind a ReLU
        assert layer.pruned == max(int(layer.weights * share) + 1, dead)  # one block of up to 128 columns


@pytest.mark.parametrize("criterion", ["Magnitude", "SparseGPT"])
def test_original_n_of_m_has_the_ties_of_topk(criterion):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(32, 30))
    with torch.no_grad():
        net[0].weight.copy_(torch.randint(-1, 2, (30, 32)))
    scores = net[0].weight.detach().abs()
    statistics = {"hessian": {"0": torch.eye(32)[None]}}  # inputs that have nothing to do with each other
    wanted = torch.zeros(30, 32, dtype=torch.bool)
    for start in range(0, 32, 4):  # as in lib/prune.py of Wanda
        found = torch.topk(scores[:, start : start + 4], 2, dim=1, largest=False)[1]
        wanted.scatter_(1, start + found, True)
    spec = PruneSpec(granularity="2:4", criterion=criterion, mode="original")
    ((_, mask),) = masks(find_targets(net), spec, statistics)
    assert torch.equal(mask, wanted)
    ((_, exact),) = masks(find_targets(net), replace(spec, mode="exact"), statistics)
    assert not torch.equal(exact, wanted)
    assert torch.equal(exact.sum(1), wanted.sum(1))


def test_original_sparsegpt_prunes_one_more_a_block():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10))
    report = prune(
        net, sparsity=0.5, criterion="SparseGPT", block_width=5, mode="original", inputs=[torch.randn(50, 12)]
    )
    assert report.pruned == sum(int(10 * width * 0.5) + 1 for width in (5, 5, 2))


# --- what makes no sense --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"criterion": "SparseGPT", "granularity": "row"},
            "SparseGPT is not defined for granularity row: choose column_bl",
        ),
        ({"criterion": "SparseGPT", "band": (0.1, 0.2)}, "ranks no weights"),
        ({"granularity": "N:M"}, "as in 2:4"),
        ({"granularity": "5:4", "sparsity": 0.5}, "prunes 5 of every 4"),
        ({"granularity": "2:4", "sparsity": 0.4}, "prunes 0.5, not 0.4: leave sparsity out, or set it to 0.5"),
        ({"granularity": "2:4", "sparsity": 0.5, "allocation": "OWL"}, "OWL has no effect under granularity 2:4"),
        ({"criterion": "Wanda", "granularity": "component", "order": "sequential"}, "sequential cannot rank a whole"),
        ({"order": "onepass"}, "Unknown order 'onepass'. Did you mean 'one_pass'"),
        ({"mode": "original", "granularity": "row"}, "mode original: Magnitude was published by layer"),
        ({"mode": "original", "allocation": "GlobalRanking", "sparsity": 0.5}, "GlobalRanking was not published"),
        ({"timesteps": "log"}, "Unknown timesteps 'log'"),
        ({"blocks": "modules"}, "Unknown blocks 'modules'"),
    ],
)
def test_choices_that_make_no_sense_are_told(options, words):
    with pytest.raises(InputError, match=words):
        prune(nn.Sequential(nn.Linear(4, 4)), **options)


def test_a_hessian_that_exceeds_the_memory_names_the_layer():
    net = Blocks()
    targets = find_targets(net)
    with pytest.raises(InputError, match=r"layer 'layers\.1\.1' takes"):
        plan_passes(targets, [statistic("hessian")], memory=8 * 12 * 12)
    passes = plan_passes(targets, [statistic("hessian"), statistic("input_norm")], memory=8 * 30 * 30)
    assert len(passes) > 3
    assert passes[0].observed[0][0].name == "input_norm"  # the small one first
    listed = [target.name for one in passes for kind, ts in one.observed if kind.name == "hessian" for target in ts]
    assert listed == [target.name for target in targets]
