"""Masks against a naive sort of every group, through `prune` and `masks`."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from sdprune import prune
from sdprune.errors import InputError
from sdprune.pruning import Magnitude, PruneSpec, Ranking, find_targets, masks

SPARSITIES = [0.0, 0.001, 0.25, 0.35, 0.475, 0.5, 0.999, 1.0]
GRANULARITIES = ["layer", "row", "column_block", "module_block", "component"]


class Net(nn.Module):
    """Blocks that lie apart in module order, a convolution, and widths that no block width divides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 5, 3)
        self.down_blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 8)) for _ in range(2))
        self.mid_block = nn.Sequential(nn.Linear(9, 11), nn.Conv2d(4, 6, 1))
        self.conv_out = nn.Linear(13, 3)


def continuous(weight):
    return torch.randn_like(weight)


def rounded(weight):
    return torch.randint(-3, 4, weight.shape).to(weight.dtype)


def equal(weight):
    return torch.full_like(weight, 0.5)


def nearby(weight):
    """Values that differ in their last bits alone."""
    bits = torch.randint(0, 40, weight.shape)
    return (1 + bits * torch.finfo(weight.dtype).eps).to(weight.dtype)


def make_net(values=continuous, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(values(parameter))
    return net


def half_up(x):
    return math.floor(x + 0.5)


def lowest(scored, low, high):
    """The (score, position ...) tuples of ranks low to high - 1: Python's sort on score, then position."""
    return {position for _, position in sorted(scored)[low:high]}


def shares(k, sizes):
    quotas = [Fraction(k * size, sum(sizes)) for size in sizes]
    whole = [math.floor(quota) for quota in quotas]
    while sum(whole) < k:
        best = max(range(len(sizes)), key=lambda i: (quotas[i] - whole[i], -i))
        whole[best] += 1
    return whole


def expected(net, spec):
    """{layer: set of flat indices} by nested loops."""
    layers = [
        (t.name, t.block, [[abs(w) for w in row] for row in t.weight.detach().flatten(1).tolist()])
        for t in find_targets(net, spec.layers)
    ]
    groups = {}  # key -> list of (score, (layer index, flat index))
    layer_of = {}
    for index, (name, block, matrix) in enumerate(layers):
        for i, row in enumerate(matrix):
            for j, score in enumerate(row):
                key = {
                    "layer": (name,),
                    "row": (name, i),
                    "column_block": (name, j // spec.block_width),
                    "module_block": (block,),
                    "component": (),
                }[spec.granularity]
                groups.setdefault(key, []).append((score, (index, i * len(row) + j)))
                layer_of[key] = name
    counts = {key: half_up(len(group) * spec.sparsity) for key, group in groups.items()}
    if spec.granularity in ("row", "column_block"):
        for name, _, matrix in layers:
            keys = [key for key in groups if layer_of[key] == name]
            k = half_up(len(matrix) * len(matrix[0]) * spec.sparsity)
            counts |= dict(zip(keys, shares(k, [len(groups[key]) for key in keys]), strict=True))
    pruned = {name: set() for name, _, _ in layers}
    for key, group in groups.items():
        low, high = 0, counts[key]
        if spec.band is not None:
            low, high = (half_up(len(group) * share) for share in spec.band)
        for index, flat in lowest(group, low, high):
            pruned[layers[index][0]].add(flat)
    return pruned


def check(net, spec):
    wanted = expected(net, spec)
    targets = find_targets(net, spec.layers)
    got = {t.name: set(mask.flatten().nonzero().flatten().tolist()) for t, mask in masks(targets, spec)}
    assert got == wanted
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    report = prune(net, spec)
    for layer in report.layers:
        after = dict(net.named_parameters())[layer.name + ".weight"].flatten()
        old = before.pop(layer.name + ".weight").flatten()
        kept = [i for i in range(len(old)) if i not in wanted[layer.name]]
        assert torch.equal(after[kept], old[kept])
        assert not after[sorted(wanted[layer.name])].any()
        assert (layer.weights, layer.pruned) == (len(old), len(wanted[layer.name]))
        assert layer.zeros == int((after == 0).sum())
    for name, old in before.items():  # biases, and layers of other kinds
        assert torch.equal(net.get_parameter(name), old)
    return report


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (continuous, torch.float32),
        (continuous, torch.bfloat16),
        (rounded, torch.float16),
        (equal, torch.float32),
        (nearby, torch.float32),
        (nearby, torch.float64),
    ],
)
def test_masks_are_those_of_a_naive_sort(granularity, sparsity, values, dtype):
    spec = PruneSpec(sparsity=sparsity, granularity=granularity, block_width=4, layers=["Linear", "Conv2d"])
    check(make_net(values, dtype), spec)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("band", [(0.0, 0.3), (0.2, 0.55), (0.6, 1.0), (0.5, 0.501)])
@pytest.mark.parametrize("values", [continuous, rounded, equal])
def test_a_band_takes_the_ranks_between_two_shares_of_each_group(granularity, band, values):
    check(make_net(values), PruneSpec(band=band, granularity=granularity, block_width=3))


@pytest.mark.parametrize("granularity", ["module_block", "component"])
@pytest.mark.parametrize("values", [continuous, rounded])
def test_layers_of_different_dtypes_are_ranked_by_value(granularity, values):
    net = make_net(values)
    net.down_blocks[0].half()
    net.mid_block.bfloat16()
    net.conv_out.double()
    check(net, PruneSpec(sparsity=0.4, granularity=granularity, layers=["Conv2d", "Linear"]))


@pytest.mark.parametrize("width", [1, 5, 7, 100])
def test_column_blocks_of_any_width(width):
    check(make_net(rounded), PruneSpec(sparsity=0.37, granularity="column_block", block_width=width))


def stable_masks(scores, k):
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().sort(stable=True).indices[:k]] = True
    return mask.view(scores.shape)


class Whole(Magnitude):
    """Magnitude, scored a layer at a time."""

    rowwise = False


@pytest.mark.parametrize("criterion", [Magnitude(), Whole()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_larger_than_a_working_chunk(dtype, criterion):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1200, 1100).to(dtype))
    scores = layer[0].weight.detach().abs()
    if dtype == torch.float32:
        scores[:, 300:] = 0.01  # a run of ties that spans chunks
        layer[0].weight.data.copy_(scores)
    for spec, parts in [
        (PruneSpec(0.7, None, criterion), [slice(None)]),
        (PruneSpec(0.7, None, criterion, granularity="component"), [slice(None)]),
        (
            PruneSpec(0.7, None, criterion, granularity="column_block", block_width=800),
            [slice(0, 800), slice(800, None)],
        ),
    ]:
        ((_, mask),) = masks(find_targets(layer), spec)
        for part in parts:
            block = scores[:, part]
            assert torch.equal(mask[:, part], stable_masks(block, half_up(block.numel() * 0.7)))
    ((_, mask),) = masks(find_targets(layer), PruneSpec(0.37, None, criterion, granularity="row"))
    counts = [half_up((i + 1) * 444) - half_up(i * 444) for i in range(len(scores))]
    assert all(torch.equal(*pair) for pair in zip(mask, map(stable_masks, scores, counts), strict=True))


def test_rows_share_the_layers_count_by_largest_remainder_earlier_first():
    layer = nn.Sequential(nn.Linear(5, 4))
    ((_, mask),) = masks(find_targets(layer), PruneSpec(sparsity=0.5, granularity="row"))
    assert mask.sum(1).tolist() == [3, 3, 2, 2]
    layer = nn.Sequential(nn.Linear(5, 3))
    ((_, mask),) = masks(find_targets(layer), PruneSpec(sparsity=0.5, granularity="column_block", block_width=2))
    assert [int(mask[:, part].sum()) for part in (slice(0, 2), slice(2, 4), slice(4, 5))] == [3, 3, 2]


def test_ties_go_to_the_earlier_layer_then_the_lower_index():
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    for layer in net:
        nn.init.ones_(layer.weight)
    got = dict(masks(find_targets(net), PruneSpec(sparsity=11 / 16, granularity="component")))
    first, second = got.values()
    assert first.all()
    assert second.flatten().tolist() == [True] * 3 + [False] * 5


class Fixed(Ranking):
    """Scores given in advance."""

    def __init__(self, values: object = None) -> None:
        self.values = values

    def score(self, weight, statistics):
        return torch.as_tensor(self.values)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("bad", "word"), [(math.nan, "NaN"), (-math.nan, "NaN"), (-1.0, "negative"), (-math.inf, "negative")]
)
def test_bad_scores_name_the_layer(granularity, bad, word):
    layer = nn.Sequential(nn.Linear(3, 1))
    spec = PruneSpec(sparsity=0.5, criterion=Fixed([[1.0, bad, 2.0]]), granularity=granularity)
    with pytest.raises(InputError, match=f"'0'.*{word}"):
        prune(layer, spec)
    with pytest.raises(InputError, match=r"'0'.*int64"):
        prune(layer, PruneSpec(sparsity=0.5, criterion=Fixed([[1, 2, 3]]), granularity=granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_infinite_scores_rank_last_and_minus_zero_ties_with_zero(granularity):
    layer = nn.Sequential(nn.Linear(5, 1))
    for sparsity, wanted in [(0.4, [0, 1, 1, 0, 0]), (0.8, [0, 1, 1, 1, 1]), (1.0, [1] * 5)]:
        criterion = Fixed([[math.inf, 0.0, -0.0, 0.0, 3.0]])
        ((_, mask),) = masks(find_targets(layer), PruneSpec(sparsity, None, criterion, granularity=granularity))
        assert mask[0].int().tolist() == wanted


def test_a_weight_in_another_memory_layout_is_pruned_the_same():
    plain, last = make_net(), make_net().to(memory_format=torch.channels_last)
    spec = PruneSpec(sparsity=0.5, layers=["Conv2d"])
    assert prune(plain, spec).mask_hash == prune(last, spec).mask_hash
    assert torch.equal(plain.conv_in.weight, last.conv_in.weight)
