"""The account against counts by hand."""

import json

import pytest
import torch
from torch import nn

from sdprune import prune
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec, account


def component(rows, *, bias=True):
    layer = nn.Linear(10, rows, bias=bias)
    nn.init.normal_(layer.weight)
    if bias:
        nn.init.ones_(layer.bias)
    return nn.Sequential(layer, nn.LayerNorm(rows, bias=False))


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    text, unet, vae = component(10), component(30), component(8, bias=False)
    with torch.no_grad():
        unet[0].bias[:3] = 0  # zeros that no mask made
        vae[0].weight[0, :5] = 0
        unet[0].weight[0, 0] = 0  # a zero among the targets
    vae.register_buffer("scale", torch.zeros(1000))  # no parameter
    return {"text_encoder": text, "unet": unet, "vae": vae}


def test_all_wholes(pipeline):
    reports = {"text_encoder": prune(pipeline["text_encoder"], PruneSpec(sparsity=0.5))}
    reports["unet"] = prune(pipeline["unet"], PruneSpec(band=(0.5, 0.7)))
    got = account(pipeline, reports, ["text_encoder", "unet"])
    assert got["nominal"] == pytest.approx((0.5 * 120 + 0.2 * 360) / 480)

    def row(parameters, pruned, zeros):
        fractions = {"pruned_fraction": pruned / parameters, "zero_fraction": zeros / parameters}
        return {"parameters": parameters, "pruned": pruned, "zeros": zeros, **fractions}

    assert got["targets"] == row(100 + 300, 50 + 60, 50 + 61)
    assert got["components"] == {
        "text_encoder": row(100 + 10 + 10, 50, 50),
        "unet": row(300 + 30 + 30, 60, 60 + 1 + 3),
        "vae": row(80 + 8, 0, 5),
    }
    assert got["prunable"] == row(480, 110, 114)
    assert got["pipeline"] == row(568, 110, 119)
    assert json.loads(json.dumps(got)) == got


def test_a_prunable_component_that_is_left_dense_counts_in_the_nominal_figure(pipeline):
    reports = {"unet": prune(pipeline["unet"], PruneSpec(sparsity=0.4))}
    got = account(pipeline, reports, ["text_encoder", "unet"])
    assert got["nominal"] == pytest.approx(0.4 * 360 / 480)
    assert got["prunable"]["pruned"] == 120


def test_shared_parameters_count_once(pipeline):
    pipeline["text_encoder"].again = pipeline["text_encoder"][0]
    pipeline["unet"].borrowed = pipeline["text_encoder"][0]
    got = account(pipeline, {}, ["text_encoder", "unet"])
    assert got["components"]["text_encoder"]["parameters"] == 120
    assert got["components"]["unet"]["parameters"] == 360 + 110
    assert got["pipeline"]["parameters"] == 568
    assert got["nominal"] == 0


def test_unknown_components(pipeline):
    with pytest.raises(InputError, match=r"'unett'.*Did you mean 'unet'"):
        account(pipeline, {}, ["unett"])
