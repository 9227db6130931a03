"""A compact file: the tensors of one safetensors file as masks and values, in a safetensors container."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdprune.errors import InputError
from sdprune.outside import REPLACE, reading
from sdprune.storage.container import LONGEST, Container, Tensor, parse
from sdprune.storage.encoding import RATIO, Bytes, decode, encode

SUFFIX = ".compact.safetensors"
"""Of the names of compact files, in place of `.safetensors`."""
_FORMAT, _VERSION = "sdprune-compact", "1"
_KINDS = ("values", "mask")


def pack_file(source: Path, target: Path, compress: bool) -> None:
    """Write a safetensors file as a compact one.

    Args:
        source: the safetensors file.
        target: the compact file.
        compress: masks and values too, with zstd, where that makes them smaller.

    Raises:
        InputError: the source is damaged, or compact already.
    """
    dense = Container(source)
    header = dense.header
    if header.metadata.get("format") == _FORMAT:
        raise InputError(f"{source} is a compact file under another name: give the original file.")
    digests = {one.name: hashlib.sha256(dense.bytes_of(one).data).hexdigest() for one in header.tensors}
    entries: dict[str, Any] = {"__metadata__": {
        "format": _FORMAT, "version": _VERSION, "header": header.text.decode(),
        "header_sha256": hashlib.sha256(header.text).hexdigest(), "sha256": json.dumps(digests),
    }}  # fmt: skip
    # Sizes are known once the data is written: room is left in front of it for the longest header there can be.
    longest = {
        _key(kind, True, one): _entry(one.dtype, [*one.shape, one.size], header.size, header.size)
        for one in header.tensors
        for kind in _KINDS
    }
    room = len(json.dumps(entries | longest))
    if room > LONGEST:
        raise InputError(f"{source} has too long a header to be packed: {len(header.text):,} bytes.")
    with target.open("w+b") as file:
        end = file.seek(8 + room) - 8 - room
        for one in header.tensors:
            stored = encode(dense.bytes_of(one), one.width, file, compress)
            for kind, compressed, size in stored:
                begin, end = end, end + size
                dtype, shape = "U8", [size]
                if kind == "values" and not compressed:
                    dtype, shape = one.dtype, list(one.shape) if len(stored) == 1 else [size // one.width]
                entries[_key(kind, compressed, one)] = _entry(dtype, shape, begin, end)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(entries).encode().ljust(room))


def _key(kind: str, compressed: bool, tensor: Tensor) -> str:
    return f"{kind}{'.zstd' if compressed else ''}:{tensor.name}"


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class CompactFile:
    """A compact file from anywhere; sizes are checked before memory or disk is spent on them.

    Raises:
        InputError: it is missing, damaged or of a newer version; the line names the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = Container(path)
        metadata = self._container.header.metadata
        if metadata.get("format") != _FORMAT:
            raise InputError(f"{path} is no compact file, but is named like one. {REPLACE}")
        if metadata.get("version") != _VERSION:
            version = metadata.get("version", "")[:20]
            raise InputError(f"{path} is a compact file of version {version!r}; this sdprune reads {_VERSION!r}.")
        with reading(f"{path} is damaged"):
            text = metadata.get("header", "").encode()
            if hashlib.sha256(text).hexdigest() != metadata.get("header_sha256"):
                raise ValueError("its header does not have its checksum")
            self.header = parse(text)
            self._digests = json.loads(metadata.get("sha256", ""))
            if not isinstance(self._digests, dict):
                raise ValueError("its checksums are no object")
            left = {one.name: one for one in self._container.header.tensors}
            self._parts = {one.name: self._take_parts(one, left) for one in self.header.tensors}
            if left:
                raise ValueError(f"{next(iter(left.values()))} is part of no tensor")

    def _take_parts(self, tensor: Tensor, left: dict[str, Tensor]) -> dict[str, tuple[Bytes, bool]]:
        found = {}
        for kind in _KINDS:
            for compressed in (False, True):
                if kind not in found and (part := left.pop(_key(kind, compressed, tensor), None)):
                    found[kind] = self._container.bytes_of(part), compressed
        if "values" not in found:
            raise ValueError(f"{tensor} is missing")
        held = sum(len(data) for data, _ in found.values())
        if tensor.size > RATIO * held:
            raise ValueError(f"{tensor} takes {tensor.size:,} bytes, too many for the {held:,} that are there")
        return found

    @property
    def size(self) -> int:
        """Bytes of the original file."""
        return 8 + len(self.header.text) + self.header.size

    def write(self, target: Path) -> None:
        """Write the original file, equal byte for byte.

        Raises:
            InputError: a tensor is damaged; what is written then is not to be used.
        """
        with target.open("wb") as file:
            file.write(len(self.header.text).to_bytes(8, "little") + self.header.text)
            for tensor in self.header.tensors:
                for block in self._blocks(tensor):
                    file.write(block.data)

    def _blocks(self, tensor: Tensor) -> Iterator[Bytes]:
        digest, parts = hashlib.sha256(), self._parts[tensor.name]
        blocks = decode(tensor.width, tensor.size, parts["values"], parts.get("mask"))
        while True:
            with reading(f"{self.path} is damaged: {tensor} cannot be read"):
                block = next(blocks, None)
            if block is None:
                break
            digest.update(block.data)
            yield block
        if digest.hexdigest() != self._digests.get(tensor.name):
            raise InputError(f"{self.path} is damaged: {tensor} does not have its checksum. {REPLACE}")
