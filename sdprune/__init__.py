"""Find out how much of a text-to-image model can be pruned away before the pictures suffer.

import sdprune
sdprune.prune(module, sparsity=0.5, criterion="Wanda", inputs=batches)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdprune.api import gather, narrow, prune
    from sdprune.pipelines.loading import load
    from sdprune.pruning import PruneReport, PruneSpec
    from sdprune.sparse_kernels import use_sparse_kernels

__all__ = ["PruneReport", "PruneSpec", "gather", "load", "narrow", "prune", "use_sparse_kernels"]
_ELSEWHERE = {"load": "sdprune.pipelines.loading", "use_sparse_kernels": "sdprune.sparse_kernels"}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in __all__:  # torch takes seconds to import: `sdprune --version` does without
        raise AttributeError(f"module 'sdprune' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "sdprune.api")), name)
