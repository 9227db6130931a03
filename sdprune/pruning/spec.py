"""How one component is to be pruned."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, List, Literal, Optional, Tuple, get_args

from sdprune.errors import InputError, unknown
from sdprune.pruning.allocation import Allocation
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.targets import LAYER_KINDS

Granularity = Literal["layer", "row", "column_block", "module_block", "component"]


@dataclass
class PruneSpec:
    """How one component is to be pruned: independent choices that combine freely.

    Args:
        sparsity: share of the targeted weights to prune, in [0, 1].
        band: prune instead the weights whose rank within their group lies between these two shares, e.g. [0.1, 0.2].
        criterion: what ranks the weights: a Criterion or the name of one.
        allocation: how the sparsity is shared out among layers: an Allocation or the name of one.
        granularity: which weights are ranked against each other.
        block_width: columns of a column_block.
        layers: kinds of layer: Linear, Conv2d.
        include: shell patterns on layer names; what matches one of them is a target.
        exclude: shell patterns on layer names; what matches one of them is not.

    Raises:
        InputError: for a value out of range, an unknown name, or choices that cancel each other.
    """

    sparsity: float = 0.0
    band: Optional[Tuple[float, float]] = None
    # Defaults are names, resolved below: a configuration file can hold a name, not an instance.
    criterion: Criterion = "Magnitude"  # type: ignore[assignment]
    allocation: Allocation = "Uniform"  # type: ignore[assignment]
    granularity: Granularity = "layer"
    block_width: int = 128
    layers: List[str] = field(default_factory=lambda: ["Linear"])
    include: List[str] = field(default_factory=lambda: ["*"])
    exclude: List[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.criterion = _instance("criterion", self.criterion, Criterion)
        self.allocation = _instance("allocation", self.allocation, Allocation)
        _check_share("sparsity", self.sparsity)
        if self.granularity not in get_args(Granularity):
            raise unknown("granularity", self.granularity, get_args(Granularity))
        if self.block_width < 1:
            raise InputError(f"block_width is {self.block_width}: give the number of columns, 1 or more.")
        self._check_lists()
        if self.band is not None:
            self._check_band(self.band)
        if not isinstance(self.allocation, Uniform) and (self.granularity == "component" or self.band is not None):
            reason = "a band" if self.band is not None else "granularity component"
            raise InputError(f"Allocation {type(self.allocation).__name__} has no effect under {reason}: use Uniform.")

    @property
    def nominal(self) -> float:
        """The share of the component that is asked for: the sparsity, or the width of the band."""
        return self.sparsity if self.band is None else self.band[1] - self.band[0]

    @property
    def dense(self) -> bool:
        """Whether nothing is to be pruned."""
        return self.sparsity == 0 and self.band is None

    def describe(self) -> dict[str, Any]:
        """Everything that decides which weights are pruned, as plain JSON values in a canonical form."""
        return {
            "sparsity": float(self.sparsity),
            "band": None if self.band is None else [float(share) for share in self.band],
            "criterion": _describe(self.criterion),
            "allocation": _describe(self.allocation),
            "granularity": self.granularity,
            "block_width": self.block_width if self.granularity == "column_block" else None,
            "layers": sorted(set(self.layers)),
            "include": sorted(set(self.include)),
            "exclude": sorted(set(self.exclude)),
        }

    def _check_lists(self) -> None:
        for option in ("layers", "include", "exclude"):
            value = getattr(self, option)
            if isinstance(value, str):
                raise InputError(f"{option} is the text {value!r}: give a list, [{value!r}].")
        for kind in self.layers:
            if kind not in LAYER_KINDS:
                raise unknown("layer kind", kind, LAYER_KINDS)
        if not self.layers:
            raise InputError(f"layers is empty: choose from {', '.join(LAYER_KINDS)}.")

    def _check_band(self, band: Sequence[float]) -> None:
        if len(band) != 2:
            raise InputError(f"band is {list(band)}: give two shares, as in [0.1, 0.2].")
        for share in band:
            _check_share("band", share)
        if band[0] >= band[1]:
            raise InputError(f"band is {list(band)}: its first share must be below its second, as in [0.1, 0.2].")
        if self.sparsity != 0:
            raise InputError(f"band {list(band)} and sparsity {self.sparsity} exclude each other: set sparsity to 0.")


def subclasses(base: type) -> dict[str, type]:
    """All concrete subclasses known by now, by name."""
    found: dict[str, type] = {}
    cls: type
    for cls in base.__subclasses__():
        found |= subclasses(cls) if inspect.isabstract(cls) else {cls.__name__: cls, **subclasses(cls)}
    return found


def _instance(kind: str, value: Any, base: type) -> Any:
    if isinstance(value, base):
        return value
    choices = subclasses(base)
    if value not in choices:
        raise unknown(kind, value, sorted(choices))
    return choices[value]()


def _check_share(option: str, value: float) -> None:
    if not 0 <= value <= 1:  # also catches NaN
        raise InputError(f"{option} is {value}: give a share between 0 and 1, as in 0.35.")


def _describe(part: object) -> dict[str, Any]:
    parameters = inspect.signature(type(part).__init__).parameters.values()
    options = [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {"class": type(part).__name__, "options": {option: getattr(part, option) for option in options}}
