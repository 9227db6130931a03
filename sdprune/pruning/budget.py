"""One sparsity for a whole model, shared out among its components."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, List, Literal, NamedTuple, Optional, get_args

from sdprune.errors import InputError, as_share, unknown
from sdprune.pruning.error_path import ErrorPath, Unit
from sdprune.pruning.selection import count

Counting = Literal["nominal", "actual"]
SplitBy = Literal["share", "sensitivity"]
_ONE = 1e-6
"""How far the sum of shares may be from 1."""
_POINTS = 20
"""Equal steps of the total that a path is told at."""


class Size(NamedTuple):
    """How large a component is: all its parameters, and the weights of the layers that are pruned."""

    parameters: int
    targets: int


class InfeasibleError(InputError):
    """A component would have to lose more than it has; `reason` says which."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"The budget is infeasible: {reason}. Choose {remedy}.")
        self.reason = reason


class PathPoint(NamedTuple):
    """What measured errors say of a total, before anything is drawn."""

    total: float
    sparsities: Dict[str, float]
    """By component, of its targeted weights."""
    error: float
    """The sum of the errors of all units: that of the denoiser's prediction, where errors add up."""


class Split(NamedTuple):
    """A budget that is shared out by measurement."""

    sparsities: Dict[str, float]
    """By component, of its targeted weights."""
    path: List[PathPoint]
    """Other totals in steps of 5 %, up to the most that was measured; the budget's own is among them."""


@dataclass(frozen=True)
class Budget:
    """A total sparsity, shared out among the components: by a ratio, as in the study, or by measured errors.

    It decides the sparsity of every component; a component's specification leaves its own out (or at 0), or agrees.

    Args:
        total: zeros over all parameters of the prunable components.
        text_share: of these zeros, the share that lies in the text encoders, which all get one sparsity; the rest lies
            in the other components.
        shares: instead of text_share, the share of these zeros that lies in each component, by name, as in
            {text_encoder: 0.2, text_encoder_2: 0.3, transformer: 0.5}; components that are left out stay dense.
        counting: nominal, as the study counts, takes a component's sparsity as the share of all its parameters; actual
            takes it as the share of the weights of the layers that are pruned, so that the total is really reached.
        decimals: places that the components' sparsities are rounded to; 2 gives the study's Table 1.
        split: share goes by text_share; sensitivity by measurement: every layer of every component (with
            `allocation.unit=block` every block) gets the sparsity at which the sum of the errors of the denoiser's
            prediction is smallest, see the allocation Sensitivity. The total then is reached to the weight, and
            text_share, shares, counting and decimals have no effect.

    Source: Ramesh & Zhao, Table 1: s_text = total * share * (P_text + P_unet) / P_text, likewise the U-Net.
    """

    total: float
    text_share: float = 0.5
    counting: Counting = "nominal"
    decimals: int = 2
    split: SplitBy = "share"
    shares: Optional[Dict[str, float]] = None

    def __post_init__(self) -> None:
        for name in ("total", "text_share"):
            as_share(f"budget.{name}", getattr(self, name))
        for name, choices in (("counting", Counting), ("split", SplitBy)):
            if getattr(self, name) not in get_args(choices):
                raise unknown(name, getattr(self, name), get_args(choices))
        if self.shares is not None:
            for name, share in self.shares.items():
                as_share(f"budget.shares.{name}", share)
            if abs(sum(self.shares.values()) - 1) > _ONE:
                raise InputError(f"budget.shares is {dict(self.shares)}: give shares whose sum is 1.")
            if self.text_share != type(self).text_share:
                raise InputError(f"budget.text_share is {self.text_share}: it has no effect with shares: leave it out.")
        if self.decimals < 0:
            raise InputError(f"budget.decimals is {self.decimals}: give 0 or more.")
        for field in fields(self):
            value = getattr(self, field.name)
            if self.measured and field.name not in ("total", "split") and value != field.default:
                raise InputError(
                    f"budget.{field.name} is {value}, which has no effect with budget.split=sensitivity: leave it out."
                )

    @property
    def measured(self) -> bool:
        """Whether measured errors decide, so that the sparsities are known only after calibration."""
        return self.split == "sensitivity"

    def sparsities(self, sizes: Mapping[str, Size], text: Collection[str]) -> Dict[str, float]:
        """The sparsity of each component.

        Args:
            sizes: of all prunable components, by name.
            text: names of the text encoders among them.

        Raises:
            InfeasibleError: a sparsity above 1, naming the component.
            InputError: a share of a component that there is not.
        """
        for name in self.shares or ():
            if name not in sizes:
                raise unknown("component", name, sizes)
        everything = sum(size.parameters for size in sizes.values())
        groups = [
            (self.text_share, [name for name in sizes if name in text]),
            (1 - self.text_share, [name for name in sizes if name not in text]),
        ]
        if self.shares is not None:
            groups = [(self.shares.get(name, 0.0), [name]) for name in sizes]
        result: Dict[str, float] = {}
        for share, names in groups:
            own = sum(sizes[name].targets if self.counting == "actual" else sizes[name].parameters for name in names)
            zeros = self.total * share * everything
            sparsity = round(zeros / own, self.decimals) if own else 0.0
            if sparsity > 1 or (zeros and not own):
                raise InfeasibleError(
                    f"a total of {self.total:g} with {share:.0%} of it in {', '.join(names) or 'nothing'} would prune "
                    f"{zeros:,.0f} of {own:,} weights there",
                    "another total or other shares",
                )
            result |= dict.fromkeys(names, sparsity)
        return result

    def zeros(self, sizes: Mapping[str, Size]) -> int:
        """How many weights the total means.

        Args:
            sizes: of all prunable components, by name.

        Raises:
            InfeasibleError: more than the layers that are pruned have.
        """
        zeros, own = _zeros(sizes, self.total), sum(size.targets for size in sizes.values())
        if zeros > own:
            raise InfeasibleError(
                f"a total of {self.total:g} would prune {zeros:,} weights, and the layers that are pruned have {own:,}",
                "a smaller total, or more kinds of layers",
            )
        return zeros

    def split_measured(self, sizes: Mapping[str, Size], units: Sequence[Unit]) -> Split:
        """Share the total out by measured errors; beyond what was measured, all components get the same sparsity.

        Args:
            sizes: of all prunable components, by name.
            units: of all of them, grouped by these names.

        Raises:
            InfeasibleError: see `zeros`.
        """
        path = ErrorPath(units)

        def shares(zeros: int) -> Dict[str, float]:
            lost = path.groups(zeros)
            return {name: lost[name] / size.targets for name, size in sizes.items()}

        totals = sorted({self.total, *(number / _POINTS for number in range(_POINTS + 1))})
        zeros = {total: _zeros(sizes, total) for total in totals}
        points = [PathPoint(one, shares(lost), path.error(lost)) for one, lost in zeros.items() if lost <= path.most]
        own = self.zeros(sizes)
        if own > path.most:
            return Split(dict.fromkeys(sizes, own / sum(size.targets for size in sizes.values())), points)
        return Split(shares(own), points)

    def describe(self) -> Dict[str, Any]:
        """What has an effect, as JSON."""
        names = {"total", "split"} if self.measured else {field.name for field in fields(self)}
        unused = "shares" if self.shares is None else "text_share"
        return {name: value for name, value in asdict(self).items() if name in names - {unused}}


def _zeros(sizes: Mapping[str, Size], total: float) -> int:
    return count(sum(size.parameters for size in sizes.values()), total)
