"""One sparsity for a whole model, shared out between its text encoders and the rest."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Dict, Literal, NamedTuple, get_args

from sdprune.errors import InputError, as_share, unknown

Counting = Literal["nominal", "actual"]


class Size(NamedTuple):
    """How large a component is: all its parameters, and the weights of the layers that are pruned."""

    parameters: int
    targets: int


class InfeasibleError(InputError):
    """A component would have to lose more than it has; `reason` says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The budget is infeasible: {reason}. Choose another total or text_share.")
        self.reason = reason


@dataclass(frozen=True)
class Budget:
    """A total sparsity, and the share of the pruned weights that the text encoders lose.

    It decides the sparsity of every component; a component's specification leaves its own out (or at 0), or agrees.

    Args:
        total: zeros over all parameters of the prunable components.
        text_share: of these zeros, the share that lies in the text encoders; the rest lies in the other components.
        counting: nominal, as the study counts, takes a component's sparsity as the share of all its parameters; actual
            takes it as the share of the weights of the layers that are pruned, so that the total is really reached.
        decimals: places that the components' sparsities are rounded to; 2 gives the study's Table 1.

    Source: Ramesh & Zhao, Table 1: s_text = total * share * (P_text + P_unet) / P_text, likewise the U-Net.
    """

    total: float
    text_share: float = 0.5
    counting: Counting = "nominal"
    decimals: int = 2

    def __post_init__(self) -> None:
        for name in ("total", "text_share"):
            as_share(f"budget.{name}", getattr(self, name))
        if self.counting not in get_args(Counting):
            raise unknown("counting", self.counting, get_args(Counting))
        if self.decimals < 0:
            raise InputError(f"budget.decimals is {self.decimals}: give 0 or more.")

    def sparsities(self, sizes: Mapping[str, Size], text: Collection[str]) -> Dict[str, float]:
        """The sparsity of each component.

        Args:
            sizes: of all prunable components, by name.
            text: names of the text encoders among them.

        Raises:
            InfeasibleError: a sparsity above 1, naming the component.
        """
        everything = sum(size.parameters for size in sizes.values())
        result: Dict[str, float] = {}
        for share, names in (
            (self.text_share, [name for name in sizes if name in text]),
            (1 - self.text_share, [name for name in sizes if name not in text]),
        ):
            own = sum(sizes[name].targets if self.counting == "actual" else sizes[name].parameters for name in names)
            zeros = self.total * share * everything
            sparsity = round(zeros / own, self.decimals) if own else 0.0
            if sparsity > 1 or (zeros and not own):
                raise InfeasibleError(
                    f"a total of {self.total:g} with {share:.0%} of it in {', '.join(names) or 'nothing'} would prune "
                    f"{zeros:,.0f} of {own:,} weights there"
                )
            result |= dict.fromkeys(names, sparsity)
        return result

    def describe(self) -> Dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)
