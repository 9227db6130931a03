"""Less sparsity where there are more outliers."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.pruning.allocation.base import Allocation, Norms, Share
from sdprune.pruning.criteria.wanda import Wanda
from sdprune.pruning.selection import rational
from sdprune.pruning.targets import Target, by_block


class OWL(Allocation):
    """Outlier-weighed layerwise sparsity (Yin et al. 2024), one sparsity a block, for any criterion.

    D_l is the share, in percent, of a block's scores |W_ij| * sqrt(s_j) that exceed M times their mean. Brought to
    [0, 2 * lambda] they give s_l = S - (d_l - mean d). The mean is weighted by parameters, so that the overall sparsity
    is the requested one; what a limit of 0 or 1 cuts off is made up for by the other blocks. (The original takes the
    plain mean: on Stable Diffusion 2's U-Net the overall sparsity then drifts by up to 7 points.)

    Args:
        m: how many times the mean an outlier is.
        lambda_: half the span of the sparsities.
    """

    statistics = frozenset({"input_norm"})

    def __init__(self, m: float = 7.0, lambda_: float = 0.08) -> None:
        if not m > 0 or not 0 <= lambda_ <= 1:
            raise InputError(
                f"OWL: m is {m} and lambda_ {lambda_}: give an m above 0, as in 7, and a lambda_ in [0, 1]."
            )
        self.m, self.lambda_ = m, lambda_

    def sparsities(self, targets: Sequence[Target], sparsity: float, statistics: Norms) -> Mapping[str, Share]:  # noqa: D102
        blocks = by_block(targets)
        deviations = self._deviations(blocks, statistics)
        if deviations is None:
            return {target.name: sparsity for target in targets}
        sizes = {block: sum(target.weight.numel() for target in members) for block, members in blocks.items()}
        chosen = _fill(deviations, sizes, rational(sparsity))
        return {target.name: chosen[target.block] for target in targets}

    def original(
        self, targets: Sequence[Target], sparsity: float, statistics: Norms, criterion: str
    ) -> dict[str, float]:
        """As in luuyin/OWL: float64 shares in its order of operations, the plain mean over blocks, and for Wanda and
        SparseGPT 0.01 where a share is not above 0.

        Raises:
            InputError: where the published code divides by zero, or leaves [0, 1].
        """
        blocks = by_block(targets)
        outliers = np.array([self._published(members, statistics) for members in blocks.values()])
        low, high = outliers.min(), outliers.max()
        if low == high:
            raise InputError("mode original: all blocks have equal outliers, where OWL divides by 0. Use mode exact.")
        kept = (outliers - low) * (1 / (high - low) * self.lambda_ * 2)
        kept = kept - np.mean(kept) + (1 - sparsity)
        chosen = {block: 1 - float(share) for block, share in zip(blocks, kept, strict=True)}
        if criterion in ("Wanda", "SparseGPT"):
            chosen = {block: share if share > 0 else 0.01 for block, share in chosen.items()}
        for block, share in chosen.items():
            if not 0 <= share <= 1:
                raise InputError(f"mode original: OWL gives block {block} the sparsity {share:.4f}. Use mode exact.")
        return {target.name: chosen[target.block] for target in targets}

    def _published(self, members: list[Target], statistics: Norms) -> float:
        """D_l in percent, from the fp32 mean of the block's scores in one piece, on the CPU."""
        scores = torch.cat([_scores(target, statistics).flatten().cpu() for target in members])
        return float((scores > scores.mean() * self.m).sum().item()) / scores.numel() * 100

    def _deviations(self, blocks: dict[str, list[Target]], statistics: Norms) -> dict[str, Fraction] | None:
        """d_l by block; None if all blocks are alike."""
        outliers = {block: self._outliers(members, statistics) for block, members in blocks.items()}
        low, high = min(outliers.values()), max(outliers.values())
        if low == high:
            return None
        return {block: (d - low) / (high - low) * 2 * rational(self.lambda_) for block, d in outliers.items()}

    def _outliers(self, members: list[Target], statistics: Norms) -> Fraction:
        """D_l, as a share."""
        size = sum(target.weight.numel() for target in members)
        mean = sum(float(_scores(target, statistics).double().sum()) for target in members) / size
        return Fraction(sum(int((_scores(target, statistics) > self.m * mean).sum()) for target in members), size)


def _scores(target: Target, statistics: Norms) -> Tensor:
    return Wanda().score(target.matrix, {"input_norm": target.by_row(statistics["input_norm"][target.name])})


def _fill(deviations: dict[str, Fraction], sizes: dict[str, int], sparsity: Fraction) -> dict[str, Fraction]:
    """min(1, max(0, c - d_l)) with the c whose mean, weighted by sizes, is the sparsity: exact, so that ties stay."""
    total = sparsity * sum(sizes.values())

    def shares(c: Fraction) -> dict[str, Fraction]:
        return {block: min(Fraction(1), max(Fraction(0), c - d)) for block, d in deviations.items()}

    def pruned(c: Fraction) -> Fraction:
        return sum((share * sizes[block] for block, share in shares(c).items()), Fraction(0))

    # What is pruned grows with c, in straight lines between the points where a block meets 0 or 1.
    points = sorted({point for d in deviations.values() for point in (d, d + 1)})
    number = max(1, bisect_left(points, total, key=pruned))
    before, after = points[number - 1 : number + 1]
    low, high = pruned(before), pruned(after)
    return shares(before + (after - before) * (total - low) / (high - low))
