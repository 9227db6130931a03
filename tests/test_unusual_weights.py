"""Weights that are computed, shared, or not what they seem: pruned rightly or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sdprune
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec, find_targets, targets_of


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def refused(net, *words, **options):
    """The one line, and that no number of the module changed."""
    before = copy.deepcopy({name: value.clone() for name, value in net.state_dict().items() if not is_lazy(value)})
    with pytest.raises(InputError) as error:
        sdprune.prune(net, **{"sparsity": 0.5, **options})
    told = str(error.value)
    assert "\n" not in told
    assert [word for word in words if word not in told] == [], told
    after = {name: value for name, value in net.state_dict().items() if not is_lazy(value)}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return told


def is_lazy(value):
    return torch.nn.parameter.is_lazy(value)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations(layer, 'weight')"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations(layer, 'weight')"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations(layer, 'weight')"),
    "old weight_norm": (old_weight_norm, "torch.nn.utils.remove_weight_norm(layer)"),
    "old spectral_norm": (torch.nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm(layer)"),
    "pruned": (lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.2), "torch.nn.utils.prune.remove(layer"),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_are_refused_by_name_with_the_step_that_stores_them(how):
    wrap, step = COMPUTED[how]
    net = two_layers()
    wrap(net[1])
    refused(net, "'1'", step, "exclude")
    refused(net, "'1'", criterion="Wanda", inputs=[torch.randn(4, 8)])
    assert [layer.name for layer in sdprune.prune(net, sparsity=0.5, exclude=["1"]).layers] == ["0"]


REMOVE = {
    "weight_norm": lambda layer: torch.nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    "old spectral_norm": torch.nn.utils.remove_spectral_norm,
    "pruned": lambda layer: torch_prune.remove(layer, "weight"),
}


@pytest.mark.parametrize("how", REMOVE)
def test_the_step_that_is_told_helps(how):
    net = two_layers()
    COMPUTED[how][0](net[1])
    REMOVE[how](net[1])
    report = sdprune.prune(net, sparsity=0.5)
    net(torch.randn(2, 8))
    assert [int((layer.weight == 0).sum()) for layer in net] == [layer.zeros for layer in report.layers] == [32, 32]


def test_a_weight_that_is_a_property_is_refused():
    class Computed(nn.Linear):
        """Scales what it stores."""

        def __init__(self):
            super().__init__(4, 4)
            self.stored = nn.Parameter(self.weight.detach().clone())
            del self.weight

        @property
        def weight(self):
            return self.stored * 2

        @weight.deleter
        def weight(self):
            pass

        @weight.setter
        def weight(self, value):
            pass

    net = nn.Sequential(Computed())
    net[0]._parameters.pop("weight", None)
    refused(net, "'0'", "stores no parameter `weight`")


ODD = {
    "lazy": (lambda: nn.LazyLinear(4), "not initialized yet; run the module once"),
    "float8": (lambda: with_weight(torch.zeros(8, 8).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn; load"),
    "int8": (lambda: with_weight(torch.zeros(8, 8, dtype=torch.int8)), "torch.int8"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "torch.complex64"),
    "expanded": (lambda: with_weight(torch.randn(1, 8).expand(8, 8)), "at one address"),
    "sparse": (lambda: with_weight(torch.eye(8).to_sparse()), "torch.sparse_coo"),
}  # fmt: skip


def with_weight(weight):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_ordinary_weight_is_refused_by_name(kind):
    make, words = ODD[kind]
    net = nn.ModuleDict({"good": nn.Linear(8, 8), "odd": make()})
    told = [None, None]
    for i, options in enumerate(({}, {"criterion": "Wanda", "inputs": [torch.randn(2, 8)]})):
        with pytest.raises(InputError) as error:
            sdprune.prune(net, sparsity=0.5, **options)
        told[i] = str(error.value)
    assert told[0] == told[1]
    assert words in told[0]
    assert "'odd'" in told[0]
    assert "\n" not in told[0]
    assert sdprune.prune(net, sparsity=0.5, exclude=["odd"]).pruned == 32


@pytest.mark.parametrize("criterion", ["Magnitude", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("order", ["one_pass", "sequential"])
def test_weights_made_in_inference_mode_are_pruned_as_others(criterion, order):
    options = {"sparsity": 0.5, "criterion": criterion, "order": order, "inputs": [torch.randn(16, 8)]}
    net = two_layers()
    with torch.inference_mode():
        frozen = two_layers()
    assert frozen[0].weight.is_inference()
    report = sdprune.prune(frozen, **options)
    assert report == sdprune.prune(net, **options)
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(net, frozen, strict=True))
    assert report.zeros == 64


# --- weights that share memory --------------------------------------------------------------------------------


class Tied(nn.Module):
    """a and c share a weight; every layer sees other inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def test_a_tied_weight_is_pruned_once_and_the_report_names_all_its_layers():
    net = Tied()
    report = sdprune.prune(net, sparsity=0.25)
    assert [(layer.name, layer.tied, layer.weights) for layer in report.layers] == [("a", ["c"], 64), ("b", [], 64)]
    assert report.pruned == 32


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"include": ["c"]}, ["a"]),
        ({"include": ["a"]}, ["a"]),
        ({"exclude": ["c"]}, ["b"]),
        ({"include": ["[bc]"]}, ["a", "b"]),
    ],
)
def test_a_tied_weight_is_chosen_by_any_of_its_names(options, chosen):
    assert [target.name for target in find_targets(Tied(), **options)] == chosen


def test_a_tied_weights_statistics_are_those_of_all_its_layers():
    net, x = Tied(), torch.randn(5, 8)
    with torch.no_grad():
        hidden = net.b(net.a(x).relu()).relu()
    own = sdprune.gather(net, [x], PruneSpec(0.5, criterion="Wanda"), ["input_norm"])["input_norm"]
    wanted = [sum(rows[p][j] ** 2 for rows in (x.tolist(), hidden.tolist()) for p in range(5)) / 10 for j in range(8)]
    assert own["a"].flatten().tolist() == pytest.approx(wanted, rel=1e-5)


def sharing(case):
    """A module whose layer `a` shares memory with something that is not the same weight."""
    net = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 8)})
    weight = net["b"].weight
    if case == "rows":
        net["a"].weight = nn.Parameter(weight.data[:4])
    elif case == "later rows":
        net["a"].weight = nn.Parameter(weight.data[2:6])
    elif case == "transposed":
        net["a"] = nn.Linear(8, 8)
        net["a"].weight = nn.Parameter(weight.data.T)
    elif case == "buffer":
        net.register_buffer("all", torch.randn(200))
        net["a"].weight = nn.Parameter(net.get_buffer("all")[64:96].view(4, 8))
    elif case == "embedding":
        net["b"] = nn.Embedding(4, 8)
        net["a"].weight = net["b"].weight
    return net


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("rows", ["overlaps", "'a'", "'b.weight' (Linear)", "clone"]),
        ("later rows", ["overlaps", "'b'", "'a.weight' (Linear)", "clone"]),
        ("transposed", ["overlaps", "'a'", "'b.weight' (Linear)"]),
        ("buffer", ["overlaps", "'a'", "'all' (ModuleDict)"]),
        ("embedding", ["'a' shares its weight with 'b.weight' (Embedding)", "exclude 'a'"]),
    ],
)
@pytest.mark.parametrize("only", ["*", "a"])
def test_what_would_change_with_a_layer_is_told(case, words, only):
    refused(sharing(case), *(words if only == "*" else ["'a"]), include=[only])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_neighbours_in_one_storage_are_layers_of_their_own(device):
    whole = torch.randn(8, 8).to(device)
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
    for layer, part in zip(net, whole.chunk(2), strict=True):
        layer.weight = nn.Parameter(part)
    assert len(targets_of(net, PruneSpec(0.5))) == 2


def test_a_component_that_is_a_layer_itself_is_checked_too():
    layer = nn.Linear(8, 8)
    assert sdprune.prune(layer, sparsity=0.5).pruned == 32
    layer.register_buffer("part", layer.weight.data[:4])
    with pytest.raises(InputError, match=r"overlaps with 'part' \(Linear\)"):
        sdprune.prune(layer, sparsity=0.5)


def test_a_model_without_memory_is_checked_all_the_same():
    net = sharing("rows").to("meta")
    net["a"].weight = nn.Parameter(net["b"].weight.data[:4])
    with pytest.raises(InputError, match="overlaps"):
        sdprune.prune(net, sparsity=0.5)
