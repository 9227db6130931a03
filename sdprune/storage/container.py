"""A safetensors file from anywhere: its header is checked as a whole before any of its data is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdprune.outside import reading

_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
LONGEST = 100_000_000
"""Bytes of a header; the safetensors library reads no longer one."""
_MOST = 2**63


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Place of its first byte, from the end of the header."""
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin

    @property
    def width(self) -> int:
        """Bytes of an element; 0 where it is smaller than a byte."""
        return _BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"tensor {self.name[:100]!r}"


class Header(NamedTuple):
    """A header, as text and as what it says."""

    text: bytes
    metadata: Mapping[str, str]
    tensors: Sequence[Tensor]
    """In the order of their data, without gaps."""

    @property
    def size(self) -> int:
        """Bytes of the data that it describes."""
        return self.tensors[-1].end if self.tensors else 0


class Container:
    """A safetensors file, mapped into memory.

    Raises:
        InputError: it is missing or damaged; the line names the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(f"{path} is damaged"):
            content = np.memmap(path, np.uint8, "r").view(np.ndarray)
            length = int.from_bytes(content[:8].tobytes(), "little")
            if length > min(LONGEST, len(content) - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {len(content):,}")
            self.header = parse(content[8 : 8 + length].tobytes())
            self.data = content[8 + length :]
            if self.header.size != len(self.data):
                raise ValueError(f"its tensors take {self.header.size:,} bytes, and {len(self.data):,} are there")

    def bytes_of(self, tensor: Tensor) -> np.ndarray:
        """Its bytes, mapped."""
        return self.data[tensor.begin : tensor.end]


def parse(text: bytes) -> Header:
    """Read a header.

    Raises:
        ValueError: no such JSON; an unknown dtype; a tensor whose place fits neither its shape nor its neighbours.
    """
    entries = json.loads(text.decode(), object_pairs_hook=_once)
    if not isinstance(entries, dict):
        raise ValueError("the header is no object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no object of texts")
    tensors = sorted((_tensor(name, entry) for name, entry in entries.items()), key=lambda one: (one.begin, one.end))
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            raise ValueError(f"{tensor} begins at byte {tensor.begin}, and the one before it ends at {end}")
        end = tensor.end
    return Header(text, metadata, tensors)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} stands in the header twice")
        found[name] = value
    return found


def _tensor(name: str, entry: Any) -> Tensor:
    name.encode()  # half of a surrogate pair is no name
    tensor = f"tensor {name[:100]!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{tensor} lacks a dtype, a shape or offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{tensor} has the unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} has an impossible shape or offsets")
    bits = _BITS[dtype]
    for side in shape:
        bits *= side
        if bits >= _MOST:
            raise ValueError(f"{tensor} has a shape that overflows")
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{tensor} takes {offsets[1] - offsets[0]:,} bytes, and its shape {bits / 8:,g}")
    return Tensor(name, dtype, tuple(shape), *offsets)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST for value in values)
