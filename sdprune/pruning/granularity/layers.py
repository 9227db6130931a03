"""Whole layers, alone or together."""

from sdprune.pruning.granularity.base import Granularity
from sdprune.pruning.targets import Target


class SingleLayer(Granularity):
    """Each layer by itself."""

    name = "layer"


class ModuleBlock(Granularity):
    """All layers of a block together."""

    name = "module_block"

    def group(self, target: Target) -> str:  # noqa: D102
        return target.block


class WholeComponent(Granularity):
    """All layers of a component together: the ranking decides what each of them loses."""

    name = "component"
    whole_component = True

    def group(self, target: Target) -> str:  # noqa: D102
        return ""
