"""Input norms against nested loops."""

import pytest
import torch
from torch import nn

from sdprune.errors import InputError
from sdprune.pruning import find_targets, gather, merge


def naive(batches, columns):
    sums = [0.0] * columns
    for batch in batches:
        for position in batch.reshape(-1, columns).float().tolist():
            for j, x in enumerate(position):
                sums[j] += x * x
    return torch.tensor(sums, dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("shape", [(6, 5), (2, 7, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_all_positions(net, shape, dtype):
    net.to(dtype)
    batches = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    with gather(find_targets(net)) as norms:
        for batch in batches:
            net(batch)
        got = norms.take()
        assert norms.take() == {}
        net(batches[0])
        again = norms.take()
    hidden = [net[1](net[0](batch)).detach() for batch in batches]
    assert list(got) == ["0", "2"]
    assert got["0"].dtype == torch.float64
    torch.testing.assert_close(got["0"], naive(batches, 5), rtol=1e-12, atol=0)
    torch.testing.assert_close(got["2"], naive(hidden, 4), rtol=1e-12, atol=0)
    torch.testing.assert_close(again["0"], naive(batches[:1], 5), rtol=1e-12, atol=0)


def test_hooks_are_gone_afterwards_even_after_an_error(net):
    with pytest.raises(RuntimeError), gather(find_targets(net)) as norms:
        net(torch.ones(2, 99))
    norms.take()
    net(torch.ones(2, 5))
    assert norms.take() == {}


def test_inputs_given_by_keyword(net):
    with gather(find_targets(net, include=["0"])) as norms:
        net[0](input=torch.full((2, 5), 3.0))
    assert norms.take()["0"].tolist() == [18.0] * 5


@pytest.mark.parametrize("valid", [0, 1, 3])
@pytest.mark.parametrize("copies", [1, 2])
def test_filler_items_do_not_count_under_guidance_either(net, valid, copies):
    batch = torch.randn(copies * 3, 2, 5)
    with gather(find_targets(net)) as norms:
        norms.batch_size, norms.valid = 3, valid
        net(batch)
        got = norms.take()
    real = [batch[3 * copy + item] for copy in range(copies) for item in range(valid)]
    torch.testing.assert_close(got["0"], naive(real, 5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_filler_needs_a_batch_size_that_divides(net, batch_size):
    with gather(find_targets(net)) as norms:
        norms.batch_size, norms.valid = batch_size, 2
        with pytest.raises(InputError, match=r"'0' sees 6 items.*batch_size"):
            net(torch.ones(6, 5))


def test_convolutions_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(InputError, match=r"'0'.*later version.*Magnitude"), gather(find_targets(net, ["Conv2d"])):
        pass


def test_merge_gives_the_same_bits_in_whatever_order_batches_arrive():
    torch.manual_seed(0)
    sums = {i: {"a": torch.rand(50, dtype=torch.float64) * 10.0**i} for i in range(-8, 8)}
    forward = merge(sums, 7)
    assert torch.equal(forward["a"], merge(dict(reversed(sums.items())), 7)["a"])
    # In the order of arrival these add up to 0.
    rounding = {i: {"a": torch.tensor([x], dtype=torch.float64)} for i, x in [(2, 1.0), (0, 1e20), (1, -1e20)]}
    assert merge(rounding, 1)["a"].item() == 1.0
    assert forward["a"].dtype == torch.float32
    wanted = [sum(sums[i]["a"][j].item() for i in range(-8, 8)) / 7 for j in range(50)]
    torch.testing.assert_close(forward["a"].double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)


def test_merge_is_wandas_running_statistic_and_changes_no_partial(net):
    """s = s * n/(n+b); n += b; s += ||X_j||^2 / n (the original implementation's update)."""
    batches = [torch.randn(b, 4, 5) for b in (2, 3, 1)]
    running, n, partials = torch.zeros(5), 0, {}
    with gather(find_targets(net)) as norms:
        for index, batch in enumerate(batches):
            net(batch)
            partials[index] = norms.take()
            running *= n / (n + len(batch))
            n += len(batch)
            running += batch.reshape(-1, 5).norm(p=2, dim=0) ** 2 / n
    before = partials[0]["0"].clone()
    torch.testing.assert_close(merge(partials, n)["0"], running)
    assert torch.equal(partials[0]["0"], before)


def test_a_process_without_samples_adds_nothing():
    one = {"a": torch.ones(2, dtype=torch.float64)}
    assert merge({0: one, 1: {}}, 2)["a"].tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match="0 samples"):
        merge({}, 0)
