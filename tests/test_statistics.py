"""Input norms and Hessians against nested loops."""

import math

import pytest
import torch
from torch import nn

from sdprune.calibration.observer import InputObserver, Totals
from sdprune.errors import InputError
from sdprune.pruning import Hessian, InputNorm, find_targets, statistic

CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4},
}


def observe(net, statistic, run, kinds=("Linear",), **set_up):
    """What one batch comes to, by layer."""
    observer = InputObserver(find_targets(net, kinds), statistic)
    for name, value in set_up.items():
        setattr(observer, name, value)
    with observer.observing(), torch.no_grad():
        run(observer)
    return observer.take().totals


def outer(positions):
    """sum_p x_p x_p^T by loops over numbers."""
    columns = len(positions[0])
    total = [[0.0] * columns for _ in range(columns)]
    for x in positions:
        for i in range(columns):
            for j in range(columns):
                total[i][j] += x[i] * x[j]
    return torch.tensor(total, dtype=torch.float64)


def rows_of(batches):
    return [x for batch in batches for x in batch.reshape(-1, batch.shape[-1]).tolist()]


def windows(conv, images):
    """For each group the inputs of each output, read off the padded image number by number."""
    if conv.padding_mode == "reflect":
        images = nn.functional.pad(images, [1, 1, 1, 1], mode="reflect")
        pad = (0, 0)
    elif conv.padding == "same":
        pad = (1, 1)
    else:
        pad = conv.padding
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    _, channels, height, width = images.shape
    out_h = (height + 2 * pad[0] - dh * (kh - 1) - 1) // sh + 1
    out_w = (width + 2 * pad[1] - dw * (kw - 1) - 1) // sw + 1
    size = channels // conv.groups
    found = [[] for _ in range(conv.groups)]
    for image in images.tolist():
        for y in range(out_h):
            for x in range(out_w):
                for group in range(conv.groups):
                    one = []
                    for c in range(group * size, (group + 1) * size):
                        for i in range(kh):
                            for j in range(kw):
                                a, b = y * sh + i * dh - pad[0], x * sw + j * dw - pad[1]
                                inside = 0 <= a < height and 0 <= b < width
                                one.append(image[c][a][b] if inside else 0.0)
                    found[group].append(one)
    return found


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("shape", [(6, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_layers_count_all_positions_average_their_calls_and_change_nothing(net, shape, dtype):
    net.to(dtype)
    batches = [torch.randn(shape, dtype=torch.bfloat16).to(dtype) for _ in range(3)]
    before = [batch.clone() for batch in batches]
    hidden = [net[1](net[0](batch)).detach() for batch in batches]
    norms = observe(net, InputNorm(), lambda _: [net(batch) for batch in batches])
    hessians = observe(net, Hessian(), lambda _: [net(batch) for batch in batches])
    assert all(torch.equal(batch, old) for batch, old in zip(batches, before, strict=True))
    for name, inputs in (("0", batches), ("2", hidden)):
        wanted = outer(rows_of(inputs))
        assert norms[name].dtype == torch.float64
        torch.testing.assert_close(norms[name][0, 0], wanted.diagonal() / 3, rtol=1e-12, atol=0)
        torch.testing.assert_close(hessians[name][0].double(), wanted / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_see_what_their_kernel_covers(options):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, **options)
    images = torch.randn(3, 4, 6, 7)
    wanted = [outer(group) for group in windows(conv, images)]
    layer = conv.weight.flatten(1).shape[1]
    norms = observe(nn.Sequential(conv), InputNorm(), lambda _: conv(images), ["Conv2d"])["0"]
    hessian = observe(nn.Sequential(conv), Hessian(), lambda _: conv(images), ["Conv2d"])["0"]
    assert norms.shape == (1, conv.groups, layer)
    assert hessian.shape == (conv.groups, layer, layer)
    for group, total in enumerate(wanted):
        torch.testing.assert_close(norms[0, group], total.diagonal().contiguous(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(hessian[group].double(), total, rtol=1e-5, atol=1e-5)


def test_hooks_are_gone_afterwards_even_after_an_error(net):
    observer = InputObserver(find_targets(net), InputNorm())
    with pytest.raises(InputError, match=r"'0' sees inputs of shape \[2, 99\]"), observer.observing():
        net(torch.ones(2, 99))
    observer.take()
    net(torch.ones(2, 5))
    assert observer.take().totals == {}


def test_a_take_starts_again(net):
    observer = InputObserver(find_targets(net, include=["0"]), InputNorm())
    with observer.observing():
        net[0](input=torch.full((2, 5), 3.0))  # by keyword
        first = observer.take()
        assert observer.take().totals == {}
        net[0](torch.full((1, 5), 1.0))
        second = observer.take()
    assert first.totals["0"].flatten().tolist() == [18.0] * 5
    assert second.totals["0"].flatten().tolist() == [1.0] * 5
    assert first.calls == second.calls == {"0": {0: 1}}


def test_layers_that_share_an_input_are_right_also_when_it_is_changed_in_place():
    """Query, key and value get one tensor; so do a layer and another after an in-place operation."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)])
    x = torch.randn(4, 3)
    changed = x.clone()

    def run(_):
        net[0](changed)
        net[1](changed)
        changed.mul_(2)
        net[2](changed)

    for one in (InputNorm(), Hessian()):
        changed.copy_(x)
        got = observe(net, one, run)
        torch.testing.assert_close(got["0"], got["1"], rtol=0, atol=0)
        torch.testing.assert_close(got["2"], got["0"] * 4)
        whole = outer(x.tolist())
        flat = got["0"][0] if isinstance(one, Hessian) else torch.diag(got["0"][0, 0])
        torch.testing.assert_close(flat.diagonal().double(), whole.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("valid", [0, 1, 3])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("unconditional", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("place", [0, 1])
def test_filler_does_not_count_and_a_copy_as_much_as_is_said(net, valid, copies, unconditional, place):
    batch = torch.randn(copies * 3, 2, 5)
    weights = [unconditional if copies == 2 and copy == place else 1.0 for copy in range(copies)]
    set_up = {"batch_size": 3, "valid": valid, "weights": lambda n: weights[:n]}
    norms = observe(net, InputNorm(), lambda _: net(batch), **set_up)["0"][0, 0]
    hessian = observe(net, Hessian(), lambda _: net(batch), **set_up)["0"][0]
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    for copy in range(copies):
        for item in range(valid):
            wanted += weights[copy] * outer(batch[3 * copy + item].tolist())
    torch.testing.assert_close(norms, wanted.diagonal().contiguous(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(hessian.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("valid", [0, 1, 2])
@pytest.mark.parametrize("unconditional", [0.0, 0.25, 1.0])
def test_items_of_unlike_length_one_behind_the_other(net, valid, unconditional):
    """Two copies of a batch of two: the second copy is the one without prompts, the second item may be filler."""
    items = [torch.randn(length, 5) for length in (3, 1, 2, 4)]
    set_up = {
        "batch_size": 2,
        "valid": valid,
        "weights": lambda n: [1.0, unconditional],
        "rows": lambda _: [3, 1, 2, 4],
    }
    hessian = observe(net, Hessian(), lambda _: net(torch.cat(items)), **set_up)["0"][0]
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    for number, item in enumerate(items):
        if number % 2 < valid:
            wanted += (1.0 if number < 2 else unconditional) * outer(item.tolist())
    torch.testing.assert_close(hessian.double(), wanted, rtol=1e-5, atol=1e-5)


def test_only_chosen_tokens_count(net):
    batch = torch.randn(2, 4, 5)
    tokens = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    norms = observe(net, InputNorm(), lambda _: net(batch), batch_size=2, tokens=tokens)["0"][0, 0]
    kept = [batch[i, j].tolist() for i in range(2) for j in range(4) if tokens[i, j]]
    torch.testing.assert_close(norms, outer(kept).diagonal().contiguous(), rtol=1e-12, atol=0)
    # A layer behind the pooling sees [items, columns]: everything counts.
    pooled = observe(net, InputNorm(), lambda _: net(batch[:, 0]), batch_size=2, tokens=tokens)["0"][0, 0]
    torch.testing.assert_close(pooled, outer(batch[:, 0].tolist()).diagonal().contiguous(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_filler_needs_a_batch_size_that_divides(net, batch_size):
    with pytest.raises(InputError, match=r"'0' sees 6 items.*batch_size"):
        observe(net, InputNorm(), lambda _: net(torch.ones(6, 5)), batch_size=batch_size, valid=2)


def weights_of(name, steps):
    if name == "linear":
        return [1.2 - 0.4 * i / (steps - 1) for i in range(steps)]
    falling = [0.8 + 0.4 * math.log(steps - i) / math.log(steps) for i in range(steps)]
    return {"uniform": [1.0] * steps, "log_decrease": falling, "log_increase": falling[::-1]}[name]


@pytest.mark.parametrize("timesteps", ["uniform", "linear", "log_decrease", "log_increase"])
def test_steps_are_weighted_in_norms_afterwards_and_in_hessians_at_once(net, timesteps):
    batches = [torch.randn(2, 5) * (step + 1) for step in range(4)]

    def run(observer):
        for observer.step, batch in enumerate(batches):
            net(batch)

    alpha = weights_of(timesteps, 4)
    wanted = sum(a * outer(batch.tolist()) for a, batch in zip(alpha, batches, strict=True)) / sum(alpha) / 2
    norms, hessians = Totals(statistic("input_norm", 4)), Totals(statistic("hessian", 4, timesteps))
    for totals in (norms, hessians):
        totals.samples = 2
        for name, value in observe(net, totals.statistic, run).items():
            totals.add(name, value)
    kept = norms.finish()["0"]
    assert kept.shape == (4, 1, 5)
    torch.testing.assert_close(InputNorm.read("0", kept, timesteps)[0].double(), wanted.diagonal(), rtol=1e-6, atol=0)
    torch.testing.assert_close(hessians.finish()["0"][0].double(), 2 * wanted, rtol=1e-5, atol=1e-5)


def test_an_unknown_weighting_is_told():
    with pytest.raises(InputError, match="Unknown timestep weighting 'log'"):
        statistic("hessian", 4, "log")


def test_log_decrease_goes_from_1_2_to_0_8():
    weights = statistic("hessian", 50, "log_decrease").weights
    assert weights[0] == pytest.approx(1.2)
    assert weights[-1] == pytest.approx(0.8)
    assert weights == sorted(weights, reverse=True)


def test_batches_of_the_running_statistics(net):
    """Wanda: s = s * n/(n+b); n += b; s += ||X_j||^2 / n. SparseGPT: H = H * n/(n+b); n += b; H += (2/n) X X^T."""
    batches = [torch.randn(b, 4, 5) for b in (2, 3, 1)]
    running, hessian, n = torch.zeros(5), torch.zeros(5, 5), 0
    totals = {"input_norm": Totals(InputNorm()), "hessian": Totals(Hessian())}
    for batch in batches:
        for total in totals.values():
            total.samples += len(batch)
            for name, value in observe(net, total.statistic, lambda _, batch=batch: net(batch)).items():
                total.add(name, value)
        running *= n / (n + len(batch))
        hessian *= n / (n + len(batch))
        n += len(batch)
        x = batch.reshape(-1, 5)
        running += x.norm(p=2, dim=0) ** 2 / n
        hessian += 2 / n * x.T @ x
    torch.testing.assert_close(totals["input_norm"].finish()["0"][0, 0], running)
    torch.testing.assert_close(totals["hessian"].finish()["0"][0], hessian)


def test_totals_change_no_sum_and_want_samples():
    totals, one = Totals(InputNorm()), torch.ones(1, 1, 2, dtype=torch.float64)
    totals.add("a", one)
    totals.add("a", one)
    assert one.flatten().tolist() == [1, 1]
    with pytest.raises(InputError, match="0 samples"):
        totals.finish()
    totals.samples = 4
    assert totals.finish()["a"].flatten().tolist() == [0.5, 0.5]
