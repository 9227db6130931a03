"""Masks of every criterion, allocation and granularity against one oracle in nested loops, on random small models.

The models have tiny layers, ties and dead columns; sparsities are 0, 1, round and odd, and bands stand beside them.
"""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from sdprune import prune
from sdprune.pruning import OWL, GlobalRanking, PerLayer, PruneSpec, SparseGPT, Uniform, find_targets, masks

GRANULARITIES = ["layer", "row", "column_block", "module_block", "component", "1:3", "2:4"]
SPARSITIES = [0.0, 0.001, 0.1, 0.25, 0.3, 0.35, 0.5, 0.7, 0.9, 0.999, 1.0]
KINDS = ["Linear", "Conv2d"]


class Net(nn.Module):
    """One to three blocks of one to three random layers each, and a layer outside of them."""

    def __init__(self, rng):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(self.layer(rng) for _ in range(rng.randint(1, 3)))) for _ in range(rng.randint(1, 3))
        )
        self.out = nn.Linear(rng.randint(1, 9), rng.randint(1, 4))

    @staticmethod
    def layer(rng):
        if rng.random() < 0.3:
            return nn.Conv2d(rng.randint(1, 5), rng.randint(1, 4), rng.choice([1, 2]))
        return nn.Linear(rng.randint(1, 11), rng.randint(1, 7))


def draw(rng, ties):
    """A model whose weights have ties or none, and statistics with dead columns."""
    torch.manual_seed(rng.randrange(1 << 30))
    net = Net(rng)
    statistics = {"input_norm": {}, "hessian": {}}
    for target in find_targets(net, KINDS):
        columns = target.shape[1]
        dead = torch.rand(columns) < 0.25
        with torch.no_grad():
            if ties:
                target.weight.copy_(torch.randint(-2, 3, target.weight.shape) / 4)
        inputs = torch.randn(3 * columns + 2, columns, dtype=torch.float64) * ~dead
        norms = inputs.square().sum(0)
        hessian = torch.diag((~dead).double()) if ties else inputs.T @ inputs
        statistics["input_norm"][target.name] = (norms.round() if ties else norms).float()[None, None]
        statistics["hessian"][target.name] = hessian.float()[None]
    return net, statistics


def draw_spec(rng, net, criterion, allocation, granularity):
    sparsity = rng.choice([*SPARSITIES, round(rng.random(), 3)])
    names = [target.name for target in find_targets(net, KINDS)]
    made = {
        "Uniform": Uniform,
        "OWL": lambda: OWL(m=rng.choice([1.5, 2.0, 3.0]), lambda_=rng.choice([0.08, 0.4])),
        "GlobalRanking": lambda: GlobalRanking(by=rng.choice(["Magnitude", "Wanda"])),
        "PerLayer": lambda: PerLayer({name: rng.choice(SPARSITIES) for name in rng.sample(names, len(names) // 2)}),
    }[allocation]()
    band = None
    if ":" in granularity:
        sparsity = None
    elif allocation == "Uniform" and criterion != "SparseGPT" and rng.random() < 0.3:
        sparsity, band = None, sorted(rng.sample(SPARSITIES, 2))
    return PruneSpec(
        sparsity, band, criterion=criterion, allocation=made, granularity=granularity, block_width=rng.randint(1, 5),
        layers=KINDS,
    )  # fmt: skip


# --- the oracle -----------------------------------------------------------------------------------------------


def half_up(x):
    return math.floor(x + 0.5)


def exactly(number):
    """The decimal number that is written."""
    return number if isinstance(number, Fraction) else Fraction(str(number))


def largest_remainder(quotas, total):
    counts = [math.floor(quota) for quota in quotas]
    while sum(counts) < total:
        best = max(range(len(quotas)), key=lambda i: (quotas[i] - counts[i], -i))
        counts[best] += 1
    return counts


def in_proportion(k, sizes):
    return largest_remainder([Fraction(k * size, sum(sizes)) for size in sizes], k)


def score_of(criterion, target, statistics):
    """[row][column], in the arithmetic that is promised: |w| as it is, |w| * sqrt(s) in fp32."""
    norms = statistics["input_norm"][target.name][0, 0].numpy()
    factor = np.sqrt(norms) if criterion == "Wanda" else np.ones_like(norms)
    return [[abs(np.float32(w)) * factor[j] for j, w in enumerate(row)] for row in target.matrix.tolist()]


def owl_shares(allocation, targets, sparsity, statistics):
    blocks = {}
    for target in targets:
        blocks.setdefault(target.block, []).append(target)
    outliers, sizes = {}, {}
    for block, members in blocks.items():
        scores = [float(a) for t in members for row in score_of("Wanda", t, statistics) for a in row]
        sizes[block] = len(scores)
        mean = math.fsum(scores) / len(scores)
        outliers[block] = Fraction(sum(a > allocation.m * mean for a in scores), len(scores))
    low, high = min(outliers.values()), max(outliers.values())
    if low == high:
        return {target.name: sparsity for target in targets}
    d = {block: (value - low) / (high - low) * 2 * exactly(allocation.lambda_) for block, value in outliers.items()}
    by_d = sorted(d, key=d.get)  # those with the fewest outliers lose most
    wanted = exactly(sparsity) * sum(sizes.values())
    for ones in range(len(d) + 1):
        for zeros in range(len(d) + 1 - ones):
            full, rest = by_d[:ones], by_d[ones : len(d) - zeros]
            left = wanted - sum(sizes[block] for block in full)
            if rest:
                c = (left + sum(sizes[block] * d[block] for block in rest)) / sum(sizes[block] for block in rest)
            elif left:
                continue
            shares = {block: c - d[block] for block in rest} | dict.fromkeys(full, 1)
            shares |= dict.fromkeys(by_d[len(d) - zeros :], 0)
            inside = all(0 <= shares[block] <= 1 for block in rest)
            outside = not rest or (
                all(c - d[b] >= 1 for b in full) and all(c - d[b] <= 0 for b in by_d[len(d) - zeros :])
            )
            if inside and outside:
                return {target.name: shares[target.block] for target in targets}
    raise AssertionError("no shares")


def shares_of(spec, targets, statistics):
    """(sparsity by layer, whether each is meant by itself)."""
    allocation = spec.allocation
    name = type(allocation).__name__
    if name == "OWL":
        return owl_shares(allocation, targets, spec.sparsity, statistics), False
    if name == "GlobalRanking":
        ranked = sorted(
            (score, index, i, j)
            for index, target in enumerate(targets)
            for i, row in enumerate(score_of(allocation.by, target, statistics))
            for j, score in enumerate(row)
        )
        gone = [index for _, index, _, _ in ranked[: half_up(len(ranked) * spec.sparsity)]]
        return {t.name: Fraction(gone.count(i), t.weight.numel()) for i, t in enumerate(targets)}, False
    written = allocation.layers if name == "PerLayer" else {}
    return {target.name: written.get(target.name, spec.sparsity) for target in targets}, True


def layer_counts(spec, targets, statistics):
    """What each group of layers loses, by the names of its layers."""
    shares, explicit = shares_of(spec, targets, statistics)
    groups = {}
    for target in targets:
        key = {"component": "all", "module_block": target.block}.get(spec.granularity, target.name)
        groups.setdefault(key, []).append(target)
    if explicit:
        counts = []
        for group in groups.values():
            sizes = {}  # by sparsity: floor(n * s + 0.5) in floats, as documented
            for target in group:
                sizes[shares[target.name]] = sizes.get(shares[target.name], 0) + target.weight.numel()
            counts.append(half_up(sum(size * share for share, size in sizes.items())))
    else:
        sums = [sum(exactly(shares[t.name]) * t.weight.numel() for t in group) for group in groups.values()]
        counts = largest_remainder(sums, half_up(sum(t.weight.numel() for t in targets) * spec.sparsity))
    return list(zip(groups.values(), counts, strict=True))


def lowest(scored, k):
    return {place for _, place in sorted(scored)[:k]}


def pattern_groups(target, m):
    """Columns that lie together: M neighbouring channels at one position of the kernel; no remainders."""
    channels = target.weight.shape[1]
    positions = target.shape[1] // channels
    for position in range(positions):
        for start in range(0, channels - m + 1, m):
            yield [channel * positions + position for channel in range(start, start + m)]


def expected_of_ranking(spec, targets, statistics):
    """{layer: pruned (row, column)}."""
    criterion = type(spec.criterion).__name__
    pruned = {target.name: set() for target in targets}
    if spec.pattern:
        n, m = spec.pattern
        for target in targets:
            scores = score_of(criterion, target, statistics)
            for columns in pattern_groups(target, m):
                for i, row in enumerate(scores):
                    pruned[target.name] |= {
                        (i, columns[p]) for p in lowest([(row[c], p) for p, c in enumerate(columns)], n)
                    }
        return pruned
    for group, k in layer_counts(spec, targets, statistics):
        scored = [
            (score, (index, i, j))
            for index, target in enumerate(group)
            for i, row in enumerate(score_of(criterion, target, statistics))
            for j, score in enumerate(row)
        ]
        parts, counts = [scored], [k]
        if spec.granularity in ("row", "column_block"):
            by_part = {}
            for score, place in scored:
                part = place[1] if spec.granularity == "row" else place[2] // spec.block_width
                by_part.setdefault(part, []).append((score, place))
            parts = list(by_part.values())
            counts = in_proportion(k, [len(part) for part in parts])
        for part, count in zip(parts, counts, strict=True):
            below, upto = (half_up(len(part) * share) for share in spec.band) if spec.band else (0, count)
            for _, (index, i, j) in sorted(part)[below:upto]:
                pruned[group[index].name].add((i, j))
    return pruned


def expected_of_sparsegpt(spec, targets, statistics):
    """Optimal Brain Surgeon in float64, column by column; weights of dead columns score 0 and stay."""
    counts = {} if spec.pattern else {group[0].name: k for group, k in layer_counts(spec, targets, statistics)}
    pruned = {}
    for target in targets:
        rows, columns = target.shape
        order = list(range(columns))
        if spec.pattern:
            n, m = spec.pattern
            channels = target.weight.shape[1]
            positions = columns // channels
            order = [c * positions + p for p in range(positions) for c in range(channels)]
            widths = [min(m, channels - start) for start in range(0, channels, m)] * positions
        else:
            widths = [min(spec.block_width, columns - start) for start in range(0, columns, spec.block_width)]
            shares = in_proportion(counts[target.name], [rows * width for width in widths])
        hessian = statistics["hessian"][target.name][0].double().numpy()[np.ix_(order, order)].copy()
        weight = target.matrix.double().numpy()[:, order].copy()
        dead = [hessian[j, j] == 0 for j in range(columns)]
        for j in range(columns):
            hessian[j, j] = 1 if dead[j] else hessian[j, j]
        inverse = np.linalg.inv(hessian + spec.criterion.damping * np.mean(np.diag(hessian)) * np.eye(columns))
        gone, start = set(), 0
        for number, width in enumerate(widths):
            scored, ahead = [], inverse.copy()
            for j in range(start, start + width):
                scored += [((0.0 if dead[j] else weight[i, j] ** 2 / ahead[j, j]), (i, j)) for i in range(rows)]
                ahead = ahead - np.outer(ahead[:, j], ahead[j]) / ahead[j, j]
            scored = [(float(np.float32(score)), place) for score, place in scored]  # equal in fp32 is equal
            if not spec.pattern:
                chosen = lowest(scored, shares[number])
            elif width < m:
                chosen = set()
            else:
                chosen = {place for i in range(rows) for place in lowest([s for s in scored if s[1][0] == i], n)}
            for j in range(start, start + width):
                for i in range(rows):
                    if (i, j) in chosen:
                        weight[i, j:] = weight[i, j:] - weight[i, j] / inverse[j, j] * inverse[j, j:]
                inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            gone |= chosen
            start += width
        pruned[target.name] = {(i, order[j]) for i, j in gone}
    return pruned


# --- the test -------------------------------------------------------------------------------------------------


def combinations():
    for criterion in ("Magnitude", "Wanda", "SparseGPT"):
        for allocation in ("Uniform", "OWL", "GlobalRanking", "PerLayer"):
            for granularity in GRANULARITIES:
                alone = granularity == "component" or ":" in granularity
                if criterion == "SparseGPT" and granularity != "column_block" and ":" not in granularity:
                    continue
                if allocation == "Uniform" or not alone:
                    yield criterion, allocation, granularity


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("criterion", "allocation", "granularity"), list(combinations()))
def test_masks_are_those_of_the_oracle(criterion, allocation, granularity, ties):
    rng = random.Random(f"{criterion} {allocation} {granularity} {ties}")
    for _ in range(6):
        net, statistics = draw(rng, ties)
        spec = draw_spec(rng, net, criterion, allocation, granularity)
        targets = find_targets(net, KINDS)
        oracle = expected_of_sparsegpt if isinstance(spec.criterion, SparseGPT) else expected_of_ranking
        wanted = oracle(spec, targets, statistics)
        found = {
            t.name: {tuple(place) for place in mask.nonzero().tolist()} for t, mask in masks(targets, spec, statistics)
        }
        assert found == wanted, spec
        before = {target.name: target.matrix.clone() for target in targets}
        report = prune(net, spec, statistics)
        assert [layer.pruned for layer in report.layers] == [len(wanted[target.name]) for target in targets]
        for target in targets:
            rows, columns = target.shape
            dead = statistics["hessian"][target.name][0].diagonal() == 0
            for i in range(rows):
                for j in range(columns):
                    kept = (i, j) not in wanted[target.name]
                    if not kept:
                        assert target.matrix[i, j] == 0
                    elif criterion != "SparseGPT" or dead[j] or not wanted[target.name]:
                        assert target.matrix[i, j] == before[target.name][i, j]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_layers_without_weights_are_left_alone(granularity, shape):
    net = nn.Sequential(nn.Linear(12, 4), nn.Linear(*shape))
    report = prune(net, sparsity=None if ":" in granularity else 0.5, granularity=granularity)
    assert [(layer.name, layer.pruned) for layer in report.layers] == [("0", 16 if granularity == "1:3" else 24)]
