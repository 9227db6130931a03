"""How one component is to be narrowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, List, get_args

from sdprune.errors import InputError, as_share, unknown
from sdprune.pruning.criteria import Criterion
from sdprune.pruning.criteria.base import Ranking
from sdprune.pruning.criteria.sparsegpt import SparseGPT
from sdprune.pruning.narrowing.groups.base import Kind
from sdprune.pruning.spec import described, instance
from sdprune.pruning.statistics.pruned_error import Probe
from sdprune.pruning.timesteps import Timesteps

KINDS: tuple[Kind, ...] = get_args(Kind)
_PROBE = Probe("layer", (0.25, 0.5, 0.75, 1.0), samples=24, steps=8)
"""How errors are measured; where all units would go, one step stays."""
_DROPPED = Probe("layer", (1.0,), samples=24, steps=8, read_at="prediction")
"""How errors of dropping whole layers are measured."""


@dataclass
class NarrowSpec:
    """How one component is to be narrowed: which share of its units of each kind is removed, and how they are chosen.

    Every module loses the same share, rounded to what it can lose: heads are removed one by one, neurons by eights,
    channels equally in each group of the norm. At least one such step stays. Whole layers are dropped before.

    Args:
        heads: share of the heads of every attention.
        neurons: share of the hidden neurons of every feed-forward layer.
        channels: share of the inner channels of every residual block of a U-Net.
        layers: share of the whole layers that can be dropped, such as those of a text encoder; which of them is
            measured: those without which, each alone, the guided prediction changes least (see `LayerError`).
        flops: in place of these, the share of the component's FLOPs that is removed: which module loses how many
            units is decided by measurement, so that the sum of errors is as small as it can be (see `RemovalError`).
        criterion: what ranks units, by the weights of the layer that reads them: Magnitude, Wanda, or a Ranking of
            your own, whose squared scores are added up; SparseGPT removes one after another, each time the one whose
            removal changes the layer's outputs least once the layer is refitted.
        include: shell patterns on the names of modules and layers, such as `mid_block.resnets.0`; what matches one of
            them is narrowed.
        exclude: shell patterns on the names of modules and layers; what matches one of them is not.
        refit: whether the layer that reads the units is refitted to its dense outputs, weights and bias, by least
            squares on the calibration inputs.
        damping: of that fit, as a share of the mean squared input: it draws the weights to the dense ones.
        timesteps: how much the denoising steps count in a U-Net's statistics: uniform, linear, log_decrease,
            log_increase.

    Raises:
        InputError: for a value out of range or an unknown name.
    """

    heads: float = 0.0
    neurons: float = 0.0
    channels: float = 0.0
    layers: float = 0.0
    flops: float = 0.0
    criterion: Criterion = "SparseGPT"  # type: ignore[assignment]
    include: List[str] = field(default_factory=lambda: ["*"])
    exclude: List[str] = field(default_factory=list)
    refit: bool = True
    damping: float = 0.01
    timesteps: Timesteps = "uniform"

    def __post_init__(self) -> None:
        for option in (*KINDS, "flops"):
            setattr(self, option, as_share(option, getattr(self, option)))
        if self.flops and self.shares:
            given = " and ".join(f"{kind} is {share:g}" for kind, share in self.shares.items())
            raise InputError(f"flops is {self.flops:g}, which decides the shares of all kinds, and {given}: give one.")
        self.criterion = instance("criterion", self.criterion, Criterion)
        if not isinstance(self.criterion, (Ranking, SparseGPT)):
            raise InputError(
                f"criterion is {type(self.criterion).__name__}, which ranks no whole units: choose Magnitude, Wanda, "
                "SparseGPT, or a Ranking of your own."
            )
        for option in ("include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise InputError(f"{option} is the text {getattr(self, option)!r}: give a list, as in ['mid_block*'].")
        if not self.damping > 0:
            raise InputError(f"damping is {self.damping}: give a share of the mean squared input above 0, as in 0.01.")
        if self.timesteps not in get_args(Timesteps):
            raise unknown("timesteps", self.timesteps, get_args(Timesteps))

    @property
    def shares(self) -> dict[str, float]:
        """Shares above 0 by kind; none where measurement decides them."""
        return {kind: share for kind in KINDS if (share := getattr(self, kind))}

    @property
    def removes(self) -> bool:
        """Whether anything is to be removed."""
        return bool(self.flops or self.shares)

    @property
    def units(self) -> bool:
        """Whether heads, neurons or channels are removed, and not whole layers alone."""
        return bool(self.flops or self.shares.keys() - {"layers"})

    @property
    def measured(self) -> str:
        """The option by which measurement decides what is left of the component; empty where numbers decide."""
        return "flops" if self.flops else "layers" if self.layers else ""

    @property
    def probe(self) -> Probe:
        """How the errors of removing units are measured."""
        return _PROBE

    @property
    def layer_probe(self) -> Probe:
        """How the errors of dropping whole layers are measured."""
        return _DROPPED

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics that the choice of units reads, of the layers that read units."""
        if not self.units:
            return frozenset()
        return self.criterion.statistics | ({"hessian"} if self.flops and self.refit else set())

    @property
    def calibrates(self) -> bool:
        """Whether calibration inputs are needed."""
        return bool(self.layers) or (self.units and bool(self.flops or self.refit or self.criterion.statistics))

    def describe(self) -> dict[str, Any]:
        """Everything that decides which units stay, and the weights, as plain JSON values."""
        return {
            **self.shares,
            **({"flops": self.flops} if self.flops else {}),
            "criterion": described(self.criterion),
            "include": sorted(set(self.include)),
            "exclude": sorted(set(self.exclude)),
            "refit": self.refit,
            "damping": self.damping if self.refit else None,
            "timesteps": self.timesteps if self.calibrates else None,
        }
