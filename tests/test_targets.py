"""Which layers are found, and the block each belongs to."""

import pytest
import torch
from torch import nn

from sdprune.errors import InputError
from sdprune.pruning import find_targets, module_block


def names(*args, **kwargs):
    return [target.name for target in find_targets(*args, **kwargs)]


class Sub(nn.Linear):
    """Found by isinstance, not by exact type."""


def make_net():
    attention = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": Sub(4, 4)})
    return nn.ModuleDict({"conv_in": nn.Conv2d(2, 3, 3), "attn": attention, "norm": nn.LayerNorm(4)})


def test_kinds_order_and_matrices():
    net = make_net()
    assert names(net) == ["attn.to_q", "attn.to_k"]
    assert names(net, ["Conv2d"]) == ["conv_in"]
    both = find_targets(net, ["Linear", "Conv2d"])
    assert [(t.name, t.kind) for t in both] == [
        ("conv_in", "Conv2d"),
        ("attn.to_q", "Linear"),
        ("attn.to_k", "Linear"),
    ]
    assert both[0].matrix.shape == (3, 2 * 3 * 3)
    assert both[0].matrix.data_ptr() == net["conv_in"].weight.data_ptr()
    assert torch.equal(both[0].matrix[1], net["conv_in"].weight[1].flatten())


def test_include_and_exclude_are_patterns_on_whole_names():
    net = make_net()
    assert names(net, include=["*.to_q"]) == ["attn.to_q"]
    assert names(net, include=["attn.*"], exclude=["*to_q"]) == ["attn.to_k"]
    assert names(net, include=["attn.to_k", "*q"]) == ["attn.to_q", "attn.to_k"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": ["to_q"]}, ["include", "'to_q'", "attn.to_q", "*to_q*"]),
        ({"exclude": ["attn.to_v"]}, ["exclude", "'attn.to_v'", "attn.to_"]),
        ({"exclude": ["*"]}, ["No layer is left", "exclude ['*']"]),
        ({"layers": ["Liner"]}, ["Unknown layer kind 'Liner'", "Did you mean 'Linear'", "Conv2d"]),
    ],
)
def test_what_cannot_match_is_an_error_with_the_next_step(options, words):
    with pytest.raises(InputError) as error:
        find_targets(make_net(), **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_no_layer_of_the_kind():
    with pytest.raises(InputError, match="no Conv2d layer"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), ["Conv2d"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_shared_weight_is_listed_once(device):
    layers = nn.Sequential(*(nn.Linear(3, 3, device=device) for _ in range(4)))
    layers[2].weight = layers[0].weight  # one Parameter
    assert names(layers) == ["0", "1", "3"]
    layers[3] = layers[1]  # one module
    assert names(layers) == ["0", "1"]


def test_two_parameters_on_one_storage_are_listed_once():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers[1].weight = nn.Parameter(layers[0].weight.data)
    assert names(layers) == ["0"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.layers.3.self_attn.q_proj", "encoder.layers.3"),
        ("text_model.encoder.layers.13.mlp.fc1", "encoder.layers.13"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "down_blocks.0"),
        ("mid_block.attentions.0.proj_in", "mid_block"),
        ("up_blocks.2.resnets.0.time_emb_proj", "up_blocks.2"),
        ("time_embedding.linear_1", "stem"),
        ("conv_in", "stem"),
        ("text_projection", "stem"),
    ],
)
def test_module_block(name, block):
    assert module_block(name) == block
