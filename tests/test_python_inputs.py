"""What `sdprune.prune` takes: layers of GPT-2, positional and keyword inputs, any numbers; and what it refuses."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sdprune
from sdprune.errors import InputError
from sdprune.pruning import OWL, PerLayer, PruneSpec, SparseGPT


def linear(features=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, features))


# --- Conv1D ---------------------------------------------------------------------------------------------------


def conv1d_and_linear():
    """The same two layers as Conv1D and as Linear."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    linears = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
    convs = nn.Sequential(Conv1D(20, 12), nn.ReLU(), Conv1D(12, 20))
    with torch.no_grad():
        for conv, layer in ((convs[0], linears[0]), (convs[2], linears[2])):
            conv.weight.copy_(layer.weight.T)
            conv.bias.copy_(layer.bias)
    return convs, linears


@pytest.mark.parametrize("order", ["one_pass", "sequential"])
@pytest.mark.parametrize("allocation", ["Uniform", "OWL", "GlobalRanking"])
@pytest.mark.parametrize(
    ("criterion", "granularity"),
    [
        ("Magnitude", "layer"), ("Magnitude", "row"), ("Magnitude", "component"), ("Wanda", "row"), ("Wanda", "2:4"),
        ("Wanda", "column_block"), ("Wanda", "module_block"), ("SparseGPT", "column_block"), ("SparseGPT", "2:4"),
    ],
)  # fmt: skip
def test_conv1d_is_pruned_as_the_linear_layer_that_it_is(criterion, granularity, allocation, order):
    if allocation != "Uniform" and granularity in ("component", "2:4"):
        with pytest.raises(InputError):
            PruneSpec(0.5, granularity=granularity, allocation=allocation)
        return
    convs, linears = conv1d_and_linear()
    options = {"sparsity": 0.5, "criterion": criterion, "granularity": granularity, "order": order}
    options |= {"block_width": 5, "allocation": allocation, "inputs": [torch.randn(3, 7, 12) for _ in range(3)]}
    got = sdprune.prune(convs, layers=["Conv1D"], **options)
    wanted = sdprune.prune(linears, **options)
    assert [(one.kind, one.pruned, one.zeros) for one in got.layers] == [
        ("Conv1D", one.pruned, one.zeros) for one in wanted.layers
    ]
    for i in (0, 2):
        assert torch.equal(convs[i].weight.T == 0, linears[i].weight == 0)
        torch.testing.assert_close(convs[i].weight.T, linears[i].weight, rtol=1e-5, atol=1e-6)
    assert got.pruned == 240


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()


def test_gpt2_says_what_it_has_and_what_is_tied_and_is_then_pruned():
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'lm_head' shares its weight with 'transformer\.wte\.weight' \(Embedding\)"):
        sdprune.prune(model, sparsity=0.5)
    with pytest.raises(InputError, match=r"it has 8 Conv1D, as in layers=\['Conv1D'\]"):
        sdprune.prune(model, sparsity=0.5, exclude=["lm_head"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = [{"input_ids": torch.randint(40, (2, 8))}]
    report = sdprune.prune(model, sparsity=0.5, criterion="Wanda", layers=["Conv1D"], inputs=inputs)
    assert len(report.layers) == 8
    assert {layer.kind for layer in report.layers} == {"Conv1D"}
    assert report.zeros == report.pruned == report.weights // 2
    columns = model.transformer.h[0].attn.c_attn.weight  # [inputs, outputs]: every output loses half of its inputs
    assert (columns == 0).sum(0).tolist() == [4] * 24


# --- inputs ---------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Takes arguments by position and by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x, scale, *, shift=0.0):
        return self.layer(x * scale + shift)


def test_inputs_may_have_positional_and_keyword_arguments_together():
    x, shift = torch.randn(5, 8), torch.randn(8)
    spec = PruneSpec(0.5, criterion="Wanda")
    forms = [
        ((x, 3.0), {"shift": shift}),
        ((), {"x": x, "scale": 3.0, "shift": shift}),
        {"x": x, "scale": 3.0, "shift": shift},
    ]
    wanted = [sum((x[p][j] * 3 + shift[j]).item() ** 2 for p in range(5)) / 5 for j in range(8)]
    for form in forms:
        got = sdprune.gather(Mixed(), [form], spec, ["input_norm"])["input_norm"]["layer"]
        assert got.flatten().tolist() == pytest.approx(wanted, rel=1e-5)
        assert sdprune.prune(Mixed(), spec, inputs=iter([form])).pruned == 32
    plain = [(x, 3.0), [x, 3.0]]
    hashes = {sdprune.prune(Mixed(), spec, inputs=[form]).mask_hash for form in plain}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([torch.ones(2, 8)], r"inputs\[0\] does not fit Mixed\.forward\(x, scale, \*, shift=0\.0\): missing.*'scale'"),
        ([(torch.ones(2, 8), 1.0), {"y": 3}], r"inputs\[1\] does not fit"),
        ([((torch.ones(2, 8), 1.0), {"x": 3})], "multiple values for argument 'x'"),
        ([(np.ones((2, 8), np.float32), 1.0)], "sees a ndarray: give inputs that are tensors"),
        ([(torch.ones(2, 9), 1.0)], r"'layer' sees inputs of shape \[2, 9\], but has 8 inputs"),
        ([], "inputs is empty"),
        ({"x": 1}, "inputs is a dict: give a list"),
        ("batches", "inputs is a str: give a list"),
        (5, "inputs is a int: give a list"),
    ],
)
@pytest.mark.parametrize("order", ["one_pass", "sequential"])
def test_inputs_that_cannot_be_are_told_before_anything_runs(inputs, words, order):
    with pytest.raises(InputError, match=words) as error:
        sdprune.prune(Mixed(), sparsity=0.5, criterion="Wanda", order=order, inputs=inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("criterion", ["Wanda", "SparseGPT"])
def test_a_convolution_may_see_single_images(criterion):
    """[channels, height, width] counts as [1, channels, height, width]."""
    images = [torch.randn(3, 6, 7) for _ in range(4)]
    hashes = set()
    for inputs in (images, [image[None] for image in images]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        hashes.add(sdprune.prune(net, sparsity=0.5, criterion=criterion, layers=["Conv2d"], inputs=inputs).mask_hash)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("criterion", "statistics", "words"),
    [
        ("Wanda", {"input_norm": {"0": torch.ones(8)}}, r"input_norm of layer '0' has shape \[8\], not \[steps"),
        ("Wanda", {"input_norm": {"0": torch.ones(1, 1, 9)}}, r"input_norm has shape \[9\] for a weight"),
        ("SparseGPT", {"hessian": {"0": torch.eye(8)}}, r"hessian of layer '0' has shape \[8, 8\], not \[groups"),
        ("Wanda", [torch.ones(8)], "statistics is a list: give what sdprune.gather returns"),
    ],
)
def test_statistics_of_another_shape_are_told(criterion, statistics, words):
    with pytest.raises(InputError, match=words):
        sdprune.prune(linear(), sparsity=0.5, criterion=criterion, statistics=statistics)


def test_statistics_are_gathered_by_their_names():
    batches = [torch.ones(2, 8)]
    assert set(sdprune.gather(linear(), batches, PruneSpec(0.5), "input_norm")) == {"input_norm"}
    with pytest.raises(InputError, match=r"Unknown statistic 'inputnorm'\. Did you mean 'input_norm'"):
        sdprune.gather(linear(), batches, PruneSpec(0.5), ["inputnorm"])


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_weights_without_numbers_are_told(sparsity):
    with pytest.raises(InputError, match="'0' is on the meta device"):
        sdprune.prune(linear().to("meta"), sparsity=sparsity)


def test_statistics_and_inputs_exclude_each_other():
    with pytest.raises(InputError, match="not both"):
        sdprune.prune(linear(), sparsity=0.5, criterion="Wanda", statistics={}, inputs=[torch.ones(2, 8)])


# --- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Nothing is to be pruned: give a sparsity"),
        ({"criterion": "Wanda"}, "Nothing is to be pruned"),
        ({"sparsity": "0.5"}, "sparsity is '0.5': give a number"),
        ({"sparsity": None}, "Nothing is to be pruned: give a sparsity"),
        ({"sparsity": [0.5]}, r"sparsity is \[0\.5\]: give a number"),
        ({"sparsity": True}, "sparsity is True: give a number"),
        ({"band": ("0.1", 0.2)}, "band is '0.1': give a number"),
        ({"band": 0.3}, "band is 0.3: give two shares"),
        ({"block_width": "128", "sparsity": 0.5}, "block_width is '128': give the number of columns"),
        ({"block_width": 2.5, "sparsity": 0.5}, "block_width is 2.5: give the number of columns"),
        ({"sparsty": 0.5}, "Unknown option 'sparsty'. Did you mean 'sparsity'"),
        ({"spec": 0.5}, "spec is 0.5: give a PruneSpec"),
        ({"include": [1], "sparsity": 0.5}, r"include is \[1\]: give a list of texts"),
        ({"layers": None, "sparsity": 0.5}, "layers is None: give a list of texts"),
        ({"criterion": 3, "sparsity": 0.5}, "Unknown criterion '3'"),
        ({"criterion": SparseGPT, "sparsity": 0.5}, "Unknown criterion"),
        ({"granularity": 4, "sparsity": 0.5}, "Unknown granularity '4'"),
    ],
)
def test_options_of_a_wrong_kind_are_told_in_one_line(options, words):
    net = linear()
    with pytest.raises(InputError, match=words) as error:
        sdprune.prune(net, **options)
    assert "\n" not in str(error.value)
    assert net[0].weight.all()


@pytest.mark.parametrize("module", [torch.ones(9, 9), [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_module_is_told(module):
    with pytest.raises(InputError, match=r"^A \w+ is no module: give a torch\.nn\.Module"):
        sdprune.prune(module, sparsity=0.5)
    with pytest.raises(InputError, match=r"^spec is .*: give a PruneSpec") as error:
        sdprune.prune(linear(), module)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, lambda x: np.array(x)[()]])
def test_numbers_of_numpy_are_numbers(kind):
    report = sdprune.prune(linear(), sparsity=kind(0.5), block_width=np.int64(4))
    assert report.pruned == 32
    assert json.loads(json.dumps(report.spec)) == PruneSpec(0.5).describe()
    banded = PruneSpec(band=(kind(0.25), kind(0.5)), criterion="Wanda", allocation="Uniform")
    assert json.loads(json.dumps(banded.describe()))["band"] == [0.25, 0.5]
    options = PruneSpec(0.5, criterion=SparseGPT(damping=kind(0.5)), allocation=OWL(m=kind(8.0)))
    described = json.loads(json.dumps(options.describe()))
    assert described["criterion"]["options"] == {"damping": 0.5}
    assert described["allocation"]["options"]["m"] == 8.0
    shares = PruneSpec(0.5, allocation=PerLayer({"0": kind(0.25)}))
    assert json.loads(json.dumps(shares.describe()))["allocation"]["options"] == {"layers": {"0": 0.25}}


def test_the_integers_0_and_1_are_shares():
    assert sdprune.prune(linear(), sparsity=1).pruned == 64
    assert sdprune.prune(linear(), sparsity=0).pruned == 0


def test_the_package_lists_what_it_offers_without_importing_torch():
    code = "import sys, sdprune; print(set(sdprune.__all__) <= set(dir(sdprune)), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
