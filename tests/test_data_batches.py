"""The draw, and how batches are dealt: the same ones on any number of processes."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning.fabric.utilities import move_data_to_device

from sdprune.data import Batches, BatchSampler, draw
from sdprune.errors import InputError


def rows(n):
    captions = [f"caption {k}" for k in range(n)]
    return Dataset.from_dict({"id": [100 + k for k in range(n)], "caption": captions, "file_name": captions})


def dealt(n, batch_size, world_size, fill=False):
    """The batches of each rank."""
    batches = Batches(rows(n), batch_size)
    return [[batches[k] for k in BatchSampler(n, batch_size, rank, world_size, fill)] for rank in range(world_size)]


def positions(batches):
    return [position for batch in batches for position in batch.positions[: batch.valid]]


@pytest.mark.parametrize(("n_total", "n", "seed"), [(10, 10, 0), (1000, 7, 0), (1000, 7, 3), (1, 1, 0)])
def test_draw_is_the_studys(n_total, n, seed):
    np.testing.assert_array_equal(draw(n_total, n, seed), np.random.RandomState(seed).choice(n_total, n, replace=False))


def test_draw_known_values():
    np.random.seed(0)  # the study's own lines: a global seed, then np.random.choice
    assert draw(118287, 5, 0).tolist() == np.random.choice(118287, 5, replace=False).tolist()


def test_draw_of_too_many():
    with pytest.raises(InputError, match=r"n=6 is more .* at most 5"):
        draw(5, 6, 0)


SIZES = [
    case for case in itertools.product(range(1, 14), range(1, 6), range(1, 5)) if -(-case[0] // case[1]) >= case[2]
]


@pytest.mark.parametrize("fill", [False, True])
def test_every_prompt_once_and_batch_k_the_same_everywhere(fill):
    for n, batch_size, world_size in SIZES:
        alone = {batch.index: batch for batch in dealt(n, batch_size, 1)[0]}
        ranks = dealt(n, batch_size, world_size, fill)
        together = [batch for rank in ranks for batch in rank if batch.index >= 0]
        assert sorted(positions(together)) == list(range(n)), (n, batch_size, world_size)
        assert {batch.index: batch for batch in together} == alone
        assert all(len(batch.prompts) == batch_size for batch in together)
        assert all(batch.prompts == [f"caption {k}" for k in batch.positions] for batch in together)
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_seven_prompts_at_batch_two_on_two_processes():
    first, second = dealt(7, 2, 2)
    assert [batch.positions for batch in first] == [[0, 1], [4, 5]]
    assert [batch.positions for batch in second] == [[2, 3], [6, 6]]
    assert second[1].valid == 1
    assert second[1].ids == [106, 106]
    assert second[1].prompts == ["caption 6", "caption 6"]


def test_fill_gives_every_process_the_same_number():
    for n, batch_size, world_size in itertools.product(range(1, 14), range(1, 6), range(1, 6)):
        ranks = dealt(n, batch_size, world_size, fill=True)
        assert len({len(rank) for rank in ranks}) == 1
        assert len(ranks[0]) == max(1, -(-n // (batch_size * world_size)))
        fillers = [batch for rank in ranks for batch in rank if batch.index == -1]
        assert all(batch.valid == 0 and batch.prompts == [] for batch in fillers)


def test_fill_gives_one_filler_where_there_is_nothing():
    assert [list(BatchSampler(0, 2, rank, 2, fill=True)) for rank in range(2)] == [[-1], [-1]]


def test_more_processes_than_batches():
    with pytest.raises(InputError, match=r"n=7 prompts at batch size 4 make 2 batches.* 3 processes.* at most 3"):
        BatchSampler(7, 4, 0, 3)
    with pytest.raises(InputError, match=r"Use at most 2 processes"):
        BatchSampler(2, 1, 0, 3)


def test_the_suggested_batch_size_works_and_is_the_largest():
    for n, batch_size, world_size in itertools.product(range(1, 30), range(1, 9), range(2, 9)):
        try:
            BatchSampler(n, batch_size, 0, world_size)
        except InputError as error:
            if n < world_size:
                continue
            suggested = int(str(error).split("at most ")[1].split(",")[0])
            assert len(BatchSampler(n, suggested, world_size - 1, world_size)) >= 1
            with pytest.raises(InputError):
                BatchSampler(n, suggested + 1, 0, world_size)


def test_batch_survives_lightnings_transfer():
    batch = Batches(rows(3), 2)[1]
    assert move_data_to_device(batch, torch.device("cpu")) == batch


def test_batches_end():
    with pytest.raises(IndexError):
        Batches(rows(3), 2)[2]
