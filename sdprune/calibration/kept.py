"""Tensors kept in a file until they are read again."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Shape:
    """Stands for a tensor whose numbers nothing reads any more."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device

    def get(self) -> Tensor:
        """Zeros."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


class OnFile:
    """A tensor in a file; its place is free again when nothing refers to this."""

    def __init__(self, kept: Kept, shape: Shape, offset: int, length: int) -> None:
        self.shape, self._kept, self._offset, self._length = shape, kept, offset, length

    def __del__(self) -> None:
        self._kept.free.setdefault(self._length, []).append(self._offset)

    def get(self) -> Tensor:
        """A copy on the tensor's device."""
        value = torch.empty(self.shape.size, dtype=self.shape.dtype)
        self._kept.file.seek(self._offset)
        self._kept.file.readinto(_bytes(value))
        return value.to(self.shape.device)


class Kept:
    """Tensors in one temporary file below $TMPDIR, which the system deletes when the process ends, however it ends."""

    def __init__(self) -> None:
        self.file: Any = tempfile.TemporaryFile()  # noqa: SIM115  as long as this lives
        self.free: dict[int, list[int]] = {}  # where tensors of so many bytes lay
        self._end = 0

    def put(self, value: Tensor) -> OnFile:
        """Keep a tensor."""
        content, shape = _bytes(value.detach().contiguous().cpu()), shape_of(value)
        free = self.free.get(len(content))
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + len(content))
        self.file.seek(offset)
        self.file.write(content)
        return OnFile(self, shape, offset, len(content))


def _bytes(value: Tensor) -> Any:
    """The memory of a contiguous tensor of the CPU."""
    return value.view(-1).view(torch.uint8).numpy()


def shape_of(value: Tensor) -> Shape:
    """What stands for a tensor that nothing reads."""
    return Shape(value.shape, value.dtype, value.device)


def fetched(values: Any) -> Any:
    """Nested values with the tensors that were kept."""
    return tree_map(lambda one: one.get() if isinstance(one, (OnFile, Shape)) else one, values)
