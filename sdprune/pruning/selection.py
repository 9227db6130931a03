"""Scores and a count -> boolean masks (True = pruned), exact to the last tie.

Selection is by rank: of a group of n scores the k lowest, and among equal scores the one with the lower flat index (in
a group of several layers: the earlier layer) first. The bits of a non-negative float, read as an integer, sort like the
float itself, so the k-th lowest score falls out of a histogram of the high bits and one of the low bits inside the
bucket that holds it: two passes that only count, where sorting would move everything. Counting also adds up over
parts, so a group of any size needs the scores of a few rows at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.targets import Target

Scores = Callable[[], Tensor]  # recomputed on every pass, so that no two parts' scores are held at once

_KEY_DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_DIGIT = 16  # bits a histogram resolves: 65,536 counters stay in cache
CHUNK = 1 << 20  # weights counted at a time: bounds the temporaries
_PAIRWISE = 16  # scores of a group that are compared pair by pair
_ROWS_CHUNK = 1 << 17  # weights of rows ranked at a time, which takes four times the memory


class Layer(NamedTuple):
    """A layer to be ranked."""

    target: Target
    parts: Sequence[Scores]
    """Functions that compute the scores of its rows, some at a time, first to last: floats of 0 and up, of one dtype in
    all of a group. Each is called several times, unless the group has no other."""


class Cut(NamedTuple):
    """Everything below the key is selected, and the first `ties` of those equal to it."""

    key: int
    ties: int


def count(n: int, fraction: float) -> int:
    """How many of n weights a fraction stands for: floor(n * fraction + 0.5)."""
    return math.floor(n * fraction + 0.5)


def rational(number: float | Fraction) -> Fraction:
    """The number as it is written: 0.9 is 9/10, not the float next to it, so that equal remainders come out equal."""
    return number if isinstance(number, Fraction) else Fraction(repr(float(number)))


def apportion(quotas: Sequence[Fraction], total: int) -> list[int]:
    """Round quotas to whole numbers by largest remainder, earlier first.

    They add up to the total, which is less than 1 away from the sum of the quotas; none exceeds its quota rounded up.
    """
    denominator = math.lcm(*(quota.denominator for quota in quotas))
    return _apportion([quota.numerator * (denominator // quota.denominator) for quota in quotas], denominator, total)


def split(k: int, sizes: Sequence[int]) -> list[int]:
    """Share k among groups in proportion to their sizes, by largest remainder, earlier first."""
    return _apportion([k * size for size in sizes], sum(sizes), k)


def _apportion(numerators: Sequence[int], denominator: int, total: int) -> list[int]:
    """`apportion` of quotas over one denominator: whole numbers sort faster than fractions."""
    whole = [numerator // denominator for numerator in numerators]
    by_remainder = sorted(range(len(whole)), key=lambda i: -(numerators[i] % denominator))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def select(layers: Sequence[Layer], low: int, high: int) -> Iterator[Tensor]:
    """Select ranks low to high - 1 of one group that may span several layers.

    Yields:
        Each layer's mask, bool [rows, columns], in order. A layer's weights may be changed once its mask is out.

    Raises:
        InputError: for scores that are NaN, negative or no floats, naming the layer.
    """
    keys: list[list[Scores]] = [
        [partial(_computed_keys, layer.target.name, part) for part in layer.parts] for layer in layers
    ]
    if sum(map(len, keys)) == 1:
        keys = [[cache(keys[0][0])]]
    group = list(chain.from_iterable(keys))
    lower, upper = find_cut(group, low), find_cut(group, high)
    for layer, parts in zip(layers, keys, strict=True):
        mask = torch.empty(layer.target.shape, dtype=torch.bool, device=layer.target.weight.device)
        start = 0
        for part in parts:
            selected, lower, upper = _between(part(), lower, upper)
            mask[start : start + len(selected)] = selected
            start += len(selected)
        yield mask
        del mask  # before the next one is made


def select_rows(name: str, scores: Tensor, low: Sequence[int], high: Sequence[int]) -> Tensor:
    """Select ranks low[i] to high[i] - 1 of each row i of the scores [rows, columns] of the layer so named."""
    keys = keys_of(name, scores)
    mask = _lowest_per_row(keys, high)
    if any(low):
        mask &= ~_lowest_per_row(keys, low)
    return mask


def select_pattern(name: str, scores: Tensor, n: int) -> Tensor:
    """Select the n lowest of every group of the scores [..., m]."""
    keys = keys_of(name, scores)
    m = keys.shape[-1]
    if m > _PAIRWISE:
        return _lowest_per_row(keys.reshape(-1, m), [n] * (keys.numel() // m)).view(keys.shape)
    flat = keys.reshape(-1, m)
    mask = torch.empty(flat.shape, dtype=torch.bool, device=keys.device)
    for start in range(0, len(flat), CHUNK // m):
        part = flat[start : start + CHUNK // m].T.contiguous()
        for j in range(m):  # how many come before column j
            before = (part[:j] <= part[j]).sum(0) + (part[j + 1 :] < part[j]).sum(0)
            mask[start : start + part.shape[1], j] = before < n
    return mask.view(keys.shape)


def column_blocks(columns: int, width: int) -> list[int]:
    """The widths of the column blocks."""
    return [min(width, columns - start) for start in range(0, columns, width)]


def _computed_keys(name: str, score: Scores) -> Tensor:
    return keys_of(name, score())


def keys_of(name: str, scores: Tensor) -> Tensor:
    """The scores' bits as integers of the same order, after a check that they are such."""
    if scores.dtype not in _KEY_DTYPES:
        raise InputError(f"Layer {name!r} has scores of type {scores.dtype}: a criterion must return floats.")
    keys = scores.view(_KEY_DTYPES[scores.dtype])
    if not keys.numel():
        return keys
    lowest, highest = (int(key) for key in keys.aminmax())
    if highest <= _infinity(scores.dtype) and lowest >= 0:
        return keys
    if scores.isnan().any():
        raise InputError(f"Layer {name!r} has NaN scores: check its weights and its calibration statistics for NaN.")
    if (scores < 0).any():
        raise InputError(f"Layer {name!r} has negative scores: a criterion must return scores of 0 and up.")
    return (scores + 0.0).view(keys.dtype)  # -0.0 becomes 0.0


def _infinity(dtype: torch.dtype) -> int:
    return int(torch.tensor(math.inf, dtype=dtype).view(_KEY_DTYPES[dtype]))


def find_cut(parts: Sequence[Scores], k: int) -> Cut:
    """The cut that selects the k lowest keys of all parts together."""
    if k == 0:
        return Cut(0, 0)
    keys = parts[0]()
    prefix, shift, device = 0, torch.iinfo(keys.dtype).bits - 1, keys.device
    del keys
    while shift > 0:
        bits = min(_DIGIT, shift)
        shift -= bits
        histogram = torch.zeros(1 << bits, dtype=torch.int64, device=device)
        for part in parts:
            _count(histogram, part(), prefix, shift, bits)
        cumulative = histogram.cumsum(0)
        bucket = int(torch.searchsorted(cumulative, k))
        prefix = (prefix << bits) + bucket
        if k == int(cumulative[bucket]):  # the bucket is needed whole: cut right after it
            return Cut((prefix + 1) << shift, 0)
        k -= int(cumulative[bucket] - histogram[bucket])
    return Cut(prefix, k)


def _count(histogram: Tensor, keys: Tensor, prefix: int, shift: int, bits: int) -> None:
    """Count the values of the `bits` bits above `shift`, of the keys whose higher bits are the prefix."""
    first_digit = shift + bits == torch.iinfo(keys.dtype).bits - 1
    for chunk in keys.reshape(-1).split(CHUNK):
        digits = chunk >> shift if shift else chunk
        if not first_digit:
            digits = digits[(digits >> bits) == prefix] & ((1 << bits) - 1)
        histogram += torch.bincount(digits, minlength=1 << bits)


def _between(keys: Tensor, lower: Cut, upper: Cut) -> tuple[Tensor, Cut, Cut]:
    """One part's mask, and the cuts with the ties that are left for the parts after it."""
    mask, upper = _below(keys, upper)
    if lower != Cut(0, 0):
        spared, lower = _below(keys, lower)
        mask &= spared.logical_not_()
    return mask, lower, upper


def _below(keys: Tensor, cut: Cut) -> tuple[Tensor, Cut]:
    flat, left = keys.reshape(-1), cut.ties
    mask = flat < cut.key
    for start in range(0, len(flat), CHUNK):
        if not left:
            break
        ties = (flat[start : start + CHUNK] == cut.key).nonzero().flatten()[:left]
        mask[start + ties] = True
        left -= len(ties)
    return mask.view(keys.shape), Cut(cut.key, left)


def _lowest_per_row(keys: Tensor, counts: Sequence[int]) -> Tensor:
    mask = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    columns = keys.shape[1]
    for start, stop, k in _runs(counts, max(1, _ROWS_CHUNK // columns)):
        rows = keys[start:stop]
        if k in (0, columns):
            mask[start:stop] = k > 0
        elif columns > _ROWS_CHUNK:
            for row in range(start, stop):
                mask[row] = _below(keys[row], find_cut([partial(keys.select, 0, row)], k))[0]
        else:
            mask[start:stop] = _lowest(rows, k)
    return mask


def _runs(counts: Sequence[int], longest: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, count) of neighbouring equal counts, at most of the given length."""
    start = 0
    for k, run in groupby(counts):
        end = start + sum(1 for _ in run)
        for first in range(start, end, longest):
            yield first, min(first + longest, end), k
        start = end


def _lowest(rows: Tensor, k: int) -> Tensor:
    """The k lowest of every row."""
    # On a GPU kthvalue is refused under deterministic algorithms, and sorting is fast.
    kth = rows.sort(dim=1).values[:, k - 1 : k] if rows.is_cuda else rows.kthvalue(k, dim=1, keepdim=True).values
    below, ties = rows < kth, rows == kth
    wanted = k - below.sum(1, keepdim=True)
    if (ties.sum(1, keepdim=True) > wanted).any():
        ties &= ties.cumsum(1, dtype=torch.int32) <= wanted
    return below | ties
