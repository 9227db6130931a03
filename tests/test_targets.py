"""Which layers are found, and the block each belongs to."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from sdprune.errors import InputError
from sdprune.pruning import find_targets


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


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    return CLIPTextModel(CLIPTextConfig(num_hidden_layers=14, **sizes))


def unet():
    from diffusers import UNet2DConditionModel

    levels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(sample_size=8, down_block_types=down, up_block_types=up, **levels)


def transformer():
    from diffusers import FluxTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "in_channels": 8}
    return FluxTransformer2DModel(num_layers=2, num_single_layers=2, joint_attention_dim=8, **sizes)


@pytest.mark.parametrize(
    ("make", "name", "block", "fine"),
    [
        (text_encoder, "*encoder.layers.13.mlp.fc1", "*encoder.layers.13", "*encoder.layers.13"),
        (
            unet, "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "down_blocks.0",
            "down_blocks.0.attentions.1.transformer_blocks.0",
        ),
        (unet, "down_blocks.0.attentions.1.proj_in", "down_blocks.0", "down_blocks.0.attentions.1"),
        (unet, "mid_block.attentions.0.proj_in", "mid_block", "mid_block.attentions.0"),
        (unet, "mid_block.resnets.0.time_emb_proj", "mid_block", "mid_block.resnets.0"),
        (unet, "up_blocks.1.resnets.0.time_emb_proj", "up_blocks.1", "up_blocks.1.resnets.0"),
        (unet, "time_embedding.linear_1", "stem", "stem"),
        (unet, "conv_in", "stem", "stem"),
        (transformer, "transformer_blocks.1.attn.to_q", "transformer_blocks.1", "transformer_blocks.1"),
        (transformer, "single_transformer_blocks.0.proj_mlp", *["single_transformer_blocks.0"] * 2),
        (transformer, "context_embedder", "stem", "stem"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), "0.0", "0.0", "0.0"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), "1", "stem", "stem"),
    ],
)  # fmt: skip
def test_blocks_are_read_off_the_structure(make, name, block, fine):
    net = make()
    for blocks, wanted in (("module", block), ("transformer", fine)):
        (target,) = find_targets(net, ["Linear", "Conv2d"], include=[name], blocks=blocks)
        assert fnmatchcase(target.block, wanted)
