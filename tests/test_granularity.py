"""A granularity of one's own: one class outside the package, named MODULE.CLASS, or CLASS once Python knows it."""

import json
import math
import sys

import pytest
import torch
from command_lines import predict, the_run
from torch import nn

from sdprune import prune
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec, find_targets, masks

DIAGONAL = '''
import torch

from sdprune.pruning.granularity.base import WithinLayer
from sdprune.pruning.selection import select_rows


class Diagonal(WithinLayer):
    """Each diagonal, column after column from where it begins in the first row; beyond the last column, from 0 on."""

    def mask(self, target, scores, quota):
        rows, columns = target.shape
        places = (torch.arange(columns)[:, None] + torch.arange(rows)) % columns, torch.arange(rows).expand(columns, -1)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[places[::-1]] = select_rows(target.name, scores[places[::-1]], *quota.ranks([rows] * columns))
        return mask
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(DIAGONAL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def expected(matrix, sparsity=None, band=None):
    """Pruned (row, column), by nested loops."""
    rows, columns = len(matrix), len(matrix[0])
    total = math.floor(rows * columns * (sparsity or 0) + 0.5)
    pruned = set()
    for first in range(columns):
        scored = sorted((abs(matrix[i][(first + i) % columns]), i) for i in range(rows))
        low, high = 0, total // columns + (first < total % columns)  # the largest remainder, earlier first
        if band:
            low, high = (math.floor(rows * share + 0.5) for share in band)
        pruned |= {(i, (first + i) % columns) for _, i in scored[low:high]}
    return pruned


@pytest.mark.parametrize("amount", [{"sparsity": 0.37}, {"sparsity": 1.0}, {"band": (0.2, 0.6)}])
@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (5, 5)])
def test_masks_are_those_of_nested_loops(mine, amount, shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0]))
    with torch.no_grad():
        net[0].weight.copy_(torch.randint(-3, 4, shape) / 4)  # with ties
    wanted = expected(net[0].weight.tolist(), **amount)
    spec = PruneSpec(granularity="mine.Diagonal", **amount)
    ((_, mask),) = masks(find_targets(net), spec)
    assert {tuple(place) for place in mask.nonzero().tolist()} == wanted
    assert prune(net, granularity="Diagonal", **amount).pruned == len(wanted)


def test_its_source_belongs_to_the_identity(mine, sdprune, miniature):
    told = sdprune(*predict(mine / "runs", "--model.prune.unet={sparsity: 0.3, granularity: mine.Diagonal}"))
    assert told.code == 0, told.err
    facts = json.loads((the_run(mine / "runs", "text_encoder") / "config.json").read_text())["prune"]
    assert (facts["unet"]["granularity"], len(facts["unet"]["code"])) == ("mine.Diagonal", 12)
    assert "code" not in facts["text_encoder"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "mine.Diagonals"}, "Unknown class of module 'mine' 'Diagonals'. Did you mean 'Diagonal'"),
        ({"granularity": "nowhere.Diagonal"}, "granularity is nowhere.Diagonal: module 'nowhere' cannot be imported"),
        (
            {"granularity": "mine.Diagonal", "criterion": "SparseGPT"},
            "SparseGPT is not defined for granularity mine.Di",
        ),
        ({"granularity": "mine.Diagonal", "mode": "original"}, "mode original: Magnitude was published by layer"),
    ],
)
def test_what_cannot_be(mine, options, words):
    with pytest.raises(InputError, match=words):
        PruneSpec(0.5, **options)


def test_a_mask_of_another_shape_is_named(mine):
    (mine / "mine.py").write_text(DIAGONAL.replace("return mask", "return mask.T"))
    with pytest.raises(InputError, match=r"Diagonal masks layer '0' with \[4, 6\]: `mask` must return one of the"):
        prune(nn.Sequential(nn.Linear(4, 6)), sparsity=0.5, granularity="mine.Diagonal")


def test_a_fault_in_it_shows_before_anything_is_drawn(mine, sdprune, miniature):
    (mine / "mine.py").write_text(DIAGONAL.replace("return mask", "return mask.T[:3]"))
    told = sdprune(*predict(mine / "runs", "--model.prune.unet={sparsity: 0.3, granularity: mine.Diagonal}"))
    assert told.code == 2
    assert "Diagonal masks layer" in told.err
    assert not list((mine / "runs").glob("*/images/*.png"))
