"""What a value was computed from, followed through every operation of torch; also on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Dependencies(TorchDispatchMode):
    """Carries marks from the inputs of each operation to its outputs while it is entered.

    Marks are bits of an integer and belong to memory: views share them, and writing into a part marks the whole. So a
    value may carry a mark in vain, but a value without a mark does not depend on what was marked.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, int] = {}
        self._known: list[StorageWeakRef] = []  # keep addresses from being given to others, and no memory

    def marks(self, values: Any) -> int:
        """The marks of all tensors in nested values."""
        found = 0
        for value in _tensors(values):
            found |= self._marks.get(value.untyped_storage()._cdata, 0)
        return found

    def mark(self, values: Any, marks: int) -> None:
        """Mark all tensors in nested values, in place of the marks that they had."""
        for value in _tensors(values):
            storage = value.untyped_storage()
            if storage._cdata not in self._marks:
                self._known.append(StorageWeakRef(storage))
            self._marks[storage._cdata] = marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        found = func(*args, **(kwargs or {}))
        if marks := self._of(args) | self._of(kwargs.values() if kwargs else ()):
            for value in (found,) if isinstance(found, Tensor) else _tensors(found):
                self.mark(value, marks | self._of((value,)))
        return found

    def _of(self, values: Iterable[Any]) -> int:
        """The marks of what an operation takes: tensors and lists of them; quicker than any nested values."""
        found = 0
        for value in values:
            if isinstance(value, Tensor):
                found |= self._marks.get(value.untyped_storage()._cdata, 0)
            elif isinstance(value, (list, tuple)):
                found |= self._of(value)
        return found


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))
