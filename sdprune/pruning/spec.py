"""How one component is to be pruned."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, List, Literal, Optional, Tuple, get_args

import numpy as np

from sdprune.errors import InputError, as_share, unknown
from sdprune.identity import code_of
from sdprune.pruning.allocation import Allocation
from sdprune.pruning.allocation.uniform import Uniform
from sdprune.pruning.blocks import Blocks
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.criteria.base import Ranking, Reconstruction
from sdprune.pruning.granularity import Granularity
from sdprune.pruning.granularity.base import ColumnWise
from sdprune.pruning.granularity.pattern import Pattern
from sdprune.pruning.targets import LAYER_KINDS
from sdprune.pruning.timesteps import Timesteps
from sdprune.schema import choices_of, class_named, is_packaged

AGREEMENT = 1e-3
"""How far a given sparsity may be from one that is set otherwise: 1:3 is 0.333."""
Order = Literal["one_pass", "sequential"]
Mode = Literal["exact", "original"]


@dataclass
class PruneSpec:
    """How one component is to be pruned: independent choices that combine freely.

    Args:
        sparsity: share of the targeted weights to prune, in [0, 1]; 0, the default, prunes nothing. Granularity N:M
            sets it to N / M: one that is given must agree with that, or be 0, which keeps the component dense.
        band: prune instead the weights whose rank within their group lies between these two shares, e.g. [0.1, 0.2].
        criterion: what ranks the weights: a Criterion or the name of one.
        allocation: how the sparsity is shared out among layers: an Allocation or the name of one.
        granularity: which weights are ranked against each other: layer, row, column_block, module_block, component, or
            N:M such as '2:4' (in YAML with quotes), N pruned of every M neighbouring inputs; or a class of your own by
            its name, MODULE.CLASS. By default as published: layer for Magnitude, row for Wanda, column_block for
            SparseGPT.
        block_width: columns of a column_block.
        layers: kinds of layer: Linear, Conv2d, Conv1D (GPT-2's Linear in transformers).
        include: shell patterns on layer names; what matches one of them is a target.
        exclude: shell patterns on layer names; what matches one of them is not.
        order: one_pass takes every layer's statistics from the dense model, and they serve any other pruning too;
            sequential prunes block after block, in the order in which they run, each with the statistics that the
            pruned blocks before it give.
        timesteps: how much the denoising steps count in a U-Net's statistics: uniform, linear, log_decrease,
            log_increase.
        blocks: what counts as a block of a U-Net: module (a down, mid or up block) or, finer, transformer.
        mode: exact prunes the share to the weight; original counts as the published code of the method does, ties
            of N:M as torch.topk on the same device. It does not follow Wanda's running fp32 mean of the squared norms,
            whose last bits depend on device and batch: they are summed in fp64, and single pairs of nearly equal scores
            may change places. Columns left over by N:M stay dense; published codes prune N of them, or fail.

    Raises:
        InputError: for a value out of range, an unknown name, or choices that cancel each other.
    """

    sparsity: Optional[float] = None
    band: Optional[Tuple[float, float]] = None
    # Defaults are names, resolved below: a configuration file can hold a name, not an instance.
    criterion: Criterion = "Magnitude"  # type: ignore[assignment]
    allocation: Allocation = "Uniform"  # type: ignore[assignment]
    granularity: Optional[str] = None
    block_width: int = 128
    layers: List[str] = field(default_factory=lambda: ["Linear"])
    include: List[str] = field(default_factory=lambda: ["*"])
    exclude: List[str] = field(default_factory=list)
    order: Order = "one_pass"
    timesteps: Timesteps = "uniform"
    blocks: Blocks = "module"
    mode: Mode = "exact"

    def __post_init__(self) -> None:
        self.criterion = instance("criterion", self.criterion, Criterion)
        self.allocation = instance("allocation", self.allocation, Allocation)
        self.granularity = str(self.granularity or self.criterion.granularities[0])
        if self.sparsity is not None:
            self.sparsity = as_share("sparsity", self.sparsity)
        for option, choices in (("order", Order), ("timesteps", Timesteps), ("blocks", Blocks), ("mode", Mode)):
            if getattr(self, option) not in get_args(choices):
                raise unknown(option, getattr(self, option), get_args(choices))
        if not isinstance(self.block_width, Integral) or self.block_width < 1:
            raise InputError(f"block_width is {self.block_width!r}: give the number of columns, 1 or more.")
        self.ranked: Granularity = _granularity(self.granularity, int(self.block_width))
        self._check_lists()
        if self.band is not None:
            self._check_band(self.band)
        self._check_granularity()
        if self.mode == "original":
            self._check_original()
        if self.ranked.sparsity is not None and self.sparsity != 0:
            self.sparsity = self.ranked.sparsity
        self.sparsity = float(self.sparsity or 0)

    @property
    def nominal(self) -> float:
        """The requested share of the component: the sparsity, or the width of the band."""
        return float(self.sparsity or 0) if self.band is None else self.band[1] - self.band[0]

    @property
    def dense(self) -> bool:
        """Whether nothing is to be pruned."""
        return self.sparsity == 0 and self.band is None and not self.allocation.prunes

    @property
    def pattern(self) -> Optional[Tuple[int, int]]:
        """(N, M) of an N:M granularity, N pruned of M."""
        return (self.ranked.n, self.ranked.m) if isinstance(self.ranked, Pattern) else None

    @property
    def sequential(self) -> bool:
        """Whether statistics depend on what was pruned before; without statistics the order changes nothing."""
        return self.order == "sequential" and bool(self.criterion.statistics)

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics that criterion and allocation read."""
        return frozenset() if self.dense else self.criterion.statistics | self.allocation.statistics

    def describe(self) -> dict[str, Any]:
        """Everything that decides which weights are pruned, as plain JSON values in a canonical form."""
        return {
            "sparsity": self.sparsity,
            "band": None if self.band is None else [float(share) for share in self.band],
            "criterion": described(self.criterion),
            "allocation": described(self.allocation),
            "granularity": self.granularity,
            **code_of(self.ranked),
            "block_width": getattr(self.ranked, "block_width", None),
            "layers": sorted(set(self.layers)),
            "include": sorted(set(self.include)),
            "exclude": sorted(set(self.exclude)),
            "order": "sequential" if self.sequential else "one_pass",
            "timesteps": self.timesteps if self.statistics else None,
            "blocks": self.blocks,
            "mode": self.mode,
        }

    def _check_lists(self) -> None:
        for option in ("layers", "include", "exclude"):
            value = getattr(self, option)
            if isinstance(value, str):
                raise InputError(f"{option} is the text {value!r}: give a list, [{value!r}].")
            if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
                raise InputError(f"{option} is {value!r}: give a list of texts, as in ['*'].")
        for kind in self.layers:
            if kind not in LAYER_KINDS:
                raise unknown("layer kind", kind, LAYER_KINDS)
        if not self.layers:
            raise InputError(f"layers is empty: choose from {', '.join(LAYER_KINDS)}.")

    def _check_band(self, band: Sequence[float]) -> None:
        if not isinstance(band, (list, tuple)) or len(band) != 2:
            raise InputError(f"band is {band!r}: give two shares, as in [0.1, 0.2].")
        self.band = band = (as_share("band", band[0]), as_share("band", band[1]))
        if band[0] >= band[1]:
            raise InputError(f"band is {list(band)}: its first share must be below its second, as in [0.1, 0.2].")
        if self.sparsity:
            raise InputError(f"band {list(band)} and sparsity {self.sparsity} exclude each other: set sparsity to 0.")
        if not isinstance(self.criterion, Ranking):
            raise InputError(f"{_name(self.criterion)} ranks no weights, so that there is no band of them: use Wanda.")

    def _check_granularity(self) -> None:
        given, defined, ranked = self.granularity, self.criterion.granularities, self.ranked
        if ranked.name not in defined and "any" not in defined:
            raise InputError(
                f"{_name(self.criterion)} is not defined for granularity {given}: choose {', '.join(defined)}."
            )
        if isinstance(self.criterion, Reconstruction) and not isinstance(ranked, ColumnWise):
            raise InputError(
                f"{_name(self.criterion)} wants a granularity of columns, unlike {given}: use column_block."
            )
        if ranked.sparsity is not None:
            if self.band is not None:
                raise InputError(f"A band has no effect under granularity {given}: use another granularity.")
            if self.sparsity and abs(self.sparsity - ranked.sparsity) > AGREEMENT:
                raise InputError(
                    f"granularity {given} prunes {ranked.sparsity:g}, not {self.sparsity:g}: leave sparsity out, or "
                    f"set it to {ranked.sparsity:g}."
                )
        if self.sequential and ranked.whole_component:
            raise InputError(
                "Order sequential cannot rank a whole component at once: use one_pass, or another granularity."
            )
        if isinstance(self.allocation, Uniform):
            return
        if self.band is not None or ranked.whole_component or ranked.sparsity is not None:
            reason = "a band" if self.band is not None else f"granularity {given}"
            raise InputError(f"Allocation {_name(self.allocation)} has no effect under {reason}: use Uniform.")

    def _check_original(self) -> None:
        published = self.criterion.granularities[0]
        if self.band is not None or self.ranked.name not in {published, "N:M"}:
            raise InputError(
                f"mode original: {_name(self.criterion)} was published by {published} or N:M and without bands. Use "
                "mode exact."
            )


def instance(kind: str, value: Any, base: type) -> Any:
    """The choice of a kind: as it is, or made of its name."""
    if isinstance(value, base):
        return value
    choices = choices_of([base])
    if not isinstance(value, str) or value not in choices:
        raise unknown(kind, value, choices)
    return choices[value]()


def _granularity(text: str, block_width: int) -> Granularity:
    """The granularity of that name, or of the class MODULE.CLASS."""
    if "." in text and all(part.isidentifier() for part in text.split(".")):
        try:
            cls = class_named("granularity", text, [Granularity])
        except InputError as error:
            raise InputError(str(error).removeprefix("--")) from error
        return cls.read(cls.name, block_width)
    classes: list[Any] = sorted(choices_of([Granularity]).values(), key=is_packaged, reverse=True)
    for cls in classes:
        if found := cls.read(text, block_width):
            return found
    raise unknown("granularity", text, [cls.name for cls in classes])


def _name(part: object) -> str:
    return type(part).__name__


def described(part: object) -> dict[str, Any]:
    """A criterion or an allocation with its options, as JSON."""
    parameters = inspect.signature(type(part).__init__).parameters.values()
    options = [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    values = {option: _plain(getattr(part, option)) for option in options}
    return {"class": _name(part), "options": values, **code_of(part)}


def _plain(value: Any) -> Any:
    """Numbers of numpy as those of Python, which JSON knows."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value
