"""Which units of a group stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from sdprune.pruning.criteria.base import Ranking
from sdprune.pruning.targets import Target


@dataclass(frozen=True)
class Reader:
    """A layer that reads the units of a group.

    Args:
        target: the layer.
        columns: places of the units in its matrix, [units, columns of a unit].
        statistics: of its inputs, by name, as a criterion gets them.
    """

    target: Target
    columns: Tensor
    statistics: Mapping[str, Tensor]


def by_score(readers: Sequence[Reader], criterion: Ranking, parts: int, kept: int) -> Tensor:
    """The best units by the sum of the squared scores of the weights that read them: by Wanda that is the energy that
    they send on, if inputs are uncorrelated.

    Args:
        readers: the layers.
        criterion: scores their weights.
        parts: equal runs of units that keep equally many.
        kept: how many units stay in all.

    Returns:
        Numbers of the units that stay, ascending; of equal ones the later stay.
    """
    scores = torch.stack([_scores(one, criterion) for one in readers]).sum(0)
    runs = scores.view(parts, -1)
    order = runs.sort(dim=1, stable=True).indices[:, runs.shape[1] - kept // parts :].sort(dim=1).values
    return (order + torch.arange(parts, device=order.device)[:, None] * runs.shape[1]).flatten()


def _scores(reader: Reader, criterion: Ranking) -> Tensor:
    scores = criterion.score(reader.target.matrix, reader.statistics)
    return scores.double().square().sum(0)[reader.columns].sum(1)


def greedily(readers: Sequence[Reader], damping: float, parts: int, counts: Sequence[int]) -> Iterator[Tensor]:
    """Remove one unit after another: each time the one whose loss changes the outputs least after a least-squares fit
    of all other weights (Hassibi & Stork 1993, Optimal Brain Surgeon, for several weights of every row at once).

    Args:
        readers: the layers.
        damping: a share of the mean diagonal of the Hessian.
        parts: equal runs of units that keep equally many.
        counts: how many units stay, descending.

    Yields:
        Numbers of the units that stay at each of the counts, ascending.
    """
    states = [_State(one, damping) for one in readers]
    units = len(readers[0].columns)
    run = units // parts
    left = torch.full((parts,), run, device=readers[0].columns.device)
    alive = torch.ones(units, dtype=torch.bool, device=left.device)
    for kept in counts:
        for _ in range(int(alive.sum()) - kept):
            errors = torch.stack([state.errors() for state in states]).sum(0)
            open_runs = (left > kept // parts).repeat_interleave(run)
            unit = int(errors.masked_fill(~(alive & open_runs), torch.inf).argmin())
            for state in states:
                state.remove(unit)
            alive[unit] = False
            left[unit // run] -= 1
        yield alive.nonzero().flatten()


def silenced(reader: Reader, kept: Tensor, damping: Optional[float]) -> Tensor:
    """The reader's matrix with zeros for all units but those that stay.

    With damping, the weights of these are fitted to the dense outputs by least squares, on the Hessian of its inputs.
    """
    weight, columns = reader.target.matrix, reader.columns[kept].flatten()
    found = torch.zeros_like(weight)
    found[:, columns] = weight[:, columns]
    if damping is not None:
        hessian, dense = damped(reader.statistics["hessian"], damping), weight.double()
        solved = torch.linalg.solve(hessian[columns][:, columns], hessian[columns] @ dense.T)
        found[:, columns] = solved.T.to(weight.dtype)
    return found


class _State:
    """Weights and inverse Hessian of a reader as units are removed."""

    def __init__(self, reader: Reader, damping: float) -> None:
        self.columns = reader.columns
        self.weight = reader.target.matrix.double()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(reader.statistics["hessian"], damping)))

    def errors(self) -> Tensor:
        """What removing each unit alone costs: trace(W_u (H^-1_uu)^-1 W_u^T), [units]."""
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        blocks = blocks + torch.diag_embed((blocks.diagonal(dim1=1, dim2=2) == 0).double())  # of removed ones
        weights = self.weight[:, self.columns].transpose(0, 1)  # [units, rows, width]
        solved = torch.linalg.solve(blocks, weights.transpose(1, 2))
        return (weights.transpose(1, 2) * solved).sum((1, 2))

    def remove(self, unit: int) -> None:
        """Remove a unit, and give what it did to all others."""
        columns = self.columns[unit]
        rows = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])  # [width, columns]
        self.weight -= self.weight[:, columns] @ rows
        self.inverse -= self.inverse[:, columns] @ rows
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian in float64 with a share of its mean diagonal on the diagonal; of a layer without inputs it is 1."""
    found = hessian.double()
    mean = found.diagonal().mean()
    return found + torch.eye(len(found), dtype=found.dtype, device=found.device) * (damping * mean if mean else 1)
