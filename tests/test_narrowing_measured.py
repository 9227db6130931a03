"""How many units each module loses, by measurement."""

import json
from copy import deepcopy
from itertools import product

import pytest
import torch
from command_lines import predict, process, the_run
from narrowing import Reader, calls, output, pictures, random_batches, small_unet
from torch import nn

import sdprune as package
from sdprune.errors import InputError
from sdprune.pruning.criteria.sparsegpt import SparseGPT
from sdprune.pruning.narrowing import find_groups

KINDS = ("heads", "neurons", "channels")


@pytest.fixture
def batches():
    return random_batches()


class Chain(nn.Module):
    """Feed-forward layers one behind another, with a layer that cannot be narrowed."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Reader(4, 7) for _ in range(3))
        self.head = nn.Linear(7, 3)
        torch.manual_seed(2)
        for part, scale in zip(self.parts, (1.0, 0.1, 0.3), strict=True):
            nn.init.normal_(part.fc1.weight, std=0.4)
            nn.init.zeros_(part.fc1.bias)
            nn.init.normal_(part.fc2.weight, std=scale)
            part.fc2.weight.data *= torch.tensor([0.1, 0.5, 2.0, 8.0])

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return self.head(x)


def removal_errors(chain, batches, part):
    """By the number of units that stay: the relative squared change of the outputs of the first 8 samples when one
    part alone keeps so many, removed one by one, each time the one without which a fit on all samples is best."""
    chain = deepcopy(chain).double().requires_grad_(False)
    x = torch.cat(batches).double()
    dense, entering = chain(x)[:8], []
    reader = chain.parts[part].fc2
    reader.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    chain(x)
    inputs, weight, left, found = entering[0], reader.weight.clone(), list(range(4)), {}
    wanted = inputs @ weight.T

    def fit(units):
        return torch.linalg.lstsq(inputs[:, units], wanted).solution

    while len(left) > 1:
        parts = [[one for one in left if one != unit] for unit in left]
        left = min(parts, key=lambda units: (inputs[:, units] @ fit(units) - wanted).square().sum())
        reader.weight.zero_()
        reader.weight[:, left] = fit(left).T
        change = chain(x)[:8] - dense
        found[len(left)] = float((change.square().sum(1) / dense.square().sum(1)).mean())
    return {4: 0.0, **found}


@pytest.mark.parametrize("flops", [0.2, 0.35, 0.5])
def test_measurement_shares_out_what_has_to_go(batches, flops):
    """No other numbers of units that save as much have a smaller sum of errors."""
    dense = Chain()
    errors = [removal_errors(dense, batches, part) for part in range(3)]
    for found in errors:  # each further unit costs more: then the steps of one multiplier are the best numbers
        assert found[3] < found[2] - found[3] < found[1] - found[2]
    small = deepcopy(dense)
    report = package.narrow(
        small, flops=flops, criterion=SparseGPT(damping=1e-9), damping=1e-9, inputs=[one[:8] for one in batches]
    )
    counts = tuple(one.kept for one in report.groups)
    unit, everything = 2 * 7 + 2 * 7, 3 * 4 * (2 * 7 + 2 * 7) + 2 * 7 * 3

    def saved(kept):
        return sum(4 - one for one in kept) * unit / everything

    def error(kept):
        return sum(found[one] for found, one in zip(errors, kept, strict=True))

    assert flops <= saved(counts) < flops + unit / everything
    as_much = [kept for kept in product(range(1, 5), repeat=3) if saved(kept) >= saved(counts)]
    assert error(counts) == pytest.approx(min(map(error, as_much)))
    assert len(set(counts)) > 1
    assert [part.fc1.out_features for part in small.parts] == list(counts)


def test_measurement_where_one_step_can_go(batches):
    """16 neurons go by eights: whatever has to go, one step does, and no more can."""
    for flops in (0.05, 0.5):
        small = Reader()
        assert package.narrow(small, flops=flops, inputs=batches).groups[0].kept == small.fc1.out_features == 8
    with pytest.raises(InputError, match=r"flops is 0.6, and all that can be removed has 0.500 of the"):
        package.narrow(Reader(), flops=0.6, inputs=batches)


def test_flops_are_those_of_heads_neurons_and_channels():
    """What is saved, counted by torch on the dense and on the narrowed module, but for single steps."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    dense, small = small_unet(), small_unet()
    package.narrow(small, flops=0.3, criterion="Magnitude", refit=False, inputs=calls(dense, 2))
    counts = []
    for module in (dense, small):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # as products that are counted
            output(module, calls(module)[0])
        counts.append(counter.get_total_flops())
    assert 0.3 <= 1 - counts[1] / counts[0] < 0.33
    assert {one.kind for one in find_groups(dense)} == set(KINDS)


@pytest.fixture(scope="module")
def measured(miniature, tmp_path_factory):
    """A narrowing by measurement, drawn by one process."""
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("measured")
    assert main(predict(output, *MEASURED)) == 0
    return output


MEASURED = ["--model.prune={}", "--model.narrow.unet.flops=0.08", "--model.compare_dense=false"]
MEASURED += ["--model.narrow.unet.include=['mid_block*']", "--model.narrow.unet.criterion=Wanda"]
MEASURED += ["--model.narrow.text_encoder.layers=0.6"]
LABEL = "text_encoder-narrow-layers0.6-unet-narrow-flops"


def test_measurement_by_the_command_line(sdprune, measured):
    """The name and the record say what it is; another share gathers nothing but the fit anew."""
    record = the_run(measured, f"{LABEL}0.08-wanda")
    found = json.loads((record / "results.json").read_text())["narrowing"]["unet"]
    assert found["kinds"].keys() == set(KINDS)
    assert found["spec"]["flops"] == 0.08
    stored = {path.name.rpartition("-")[0] for path in (measured / "statistics").glob("unet-*")}
    assert stored == {"unet-hessian", "unet-input_norm", "unet-removal_error"}
    told = sdprune(*predict(measured, *MEASURED, "--model.narrow.unet.flops=0.04", "--model.prune.unet.sparsity=0.5"))
    assert (told.code, told.err) == (0, "")
    assert len(list((measured / "statistics").glob("unet-removal_error-*"))) == 1
    other = json.loads((the_run(measured, f"{LABEL}0.04") / "results.json").read_text())
    assert other["narrowing"]["unet"]["parameters"] > found["parameters"]
    told = sdprune(*predict(measured, *MEASURED, "--model.narrow.unet.flops=0.9"))
    assert told.code == 2
    assert "--model.narrow.unet.flops is 0.9, and all that can be removed" in told.err


def test_two_processes_make_the_same_narrowed_model(measured, tmp_path):
    done = process(predict(tmp_path, *MEASURED, "--trainer.devices=2", "--trainer.strategy=ddp"))
    assert (done.returncode, done.stderr) == (0, "")
    one, two = (the_run(output, f"{LABEL}0.08") for output in (measured, tmp_path))
    found = [json.loads((record / "results.json").read_text())["narrowing"] for record in (one, two)]
    hashes = [{name: part["hash"] for name, part in of.items()} for of in found]
    assert hashes[0] == hashes[1]
    assert hashes[0].keys() == {"text_encoder", "unet"}
    assert pictures(one) == pictures(two)
