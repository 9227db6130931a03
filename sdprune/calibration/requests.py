"""What is to be gathered, and of what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Optional, Protocol

from torch import Tensor, nn

from sdprune.calibration.observer import InputObserver
from sdprune.pruning import PruneSpec, Target, find_targets
from sdprune.pruning.narrowing import NarrowSpec
from sdprune.pruning.statistics.pruned_error import Probe


class Subject(Protocol):
    """A component as calibration sees it, with what its batches hold."""

    @property
    def name(self) -> str:
        """Name of the component."""

    @property
    def module(self) -> nn.Module:
        """The component."""

    def replays(self, sequential: bool) -> bool:
        """Whether its blocks may run without its pipeline, on the calls that the dense model made."""

    @property
    def steps(self) -> int:
        """Denoising steps that it runs for a batch."""

    @property
    def calls_per_batch(self) -> int:
        """How often it is called for a batch."""

    def run(self, batch: Any, before_step: Callable[[int], None]) -> None:
        """Run it on a batch; `before_step` receives the number of each denoising step, from 0."""

    def replaying(self, before_step: Callable[[int], None]) -> AbstractContextManager[Callable[[int], None]]:
        """Entered while the component runs without its pipeline; what it gives is called when a step begins."""

    def bring(self) -> None:
        """See that it lies where it computes: there its weights are about to change."""

    def dense_inputs(self, batch: Any, probe: Probe) -> Callable[[], Tensor]:
        """Keep its inputs in the dense model; what is returned runs it on them, [samples, n], and whatever the probe
        reads behind it, and brings it back."""

    def try_out(self) -> None:
        """Run it on any input, the same on every process."""

    def set_up(self, observer: InputObserver, batch: Any) -> None:
        """Set an observer to what of a batch counts."""


@dataclass(frozen=True)
class Request:
    """One statistic of one component, and the facts that decide its values."""

    component: str
    statistic: str
    spec: PruneSpec
    """Says which layers, how much denoising steps count, and in sequential order how layers are pruned."""
    facts: Mapping[str, Any]
    sequential: bool = False
    """Whether layers are pruned before those that run after them are looked at."""
    before: tuple[Request, ...] = ()
    """Statistics that have to be there first: in sequential order what the allocation of `spec` reads, for a probe what
    its criterion reads."""
    probe: Optional[Probe] = None
    """How an error of pruning is measured; other statistics are sums over layer inputs."""
    narrow: Optional[NarrowSpec] = None
    """Says what is removed, where the error is that of removing whole units."""

    def targets(self, component: nn.Module) -> list[Target]:
        """The layers that it is about."""
        return find_targets(component, self.spec.layers, self.spec.include, self.spec.exclude, self.spec.blocks)
