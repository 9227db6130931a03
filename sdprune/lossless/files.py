"""Safetensors without some of their tensors, and with tables in place of others; what stays is copied byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdprune.files import write_json
from sdprune.outside import read_json
from sdprune.storage.container import Container


class New(NamedTuple):
    """A tensor that is written in place of another one."""

    name: str
    dtype: str
    data: np.ndarray
    """Its elements as integers of the same width."""


def write_reduced(path: Path, target: Path, changes: Mapping[str, list[New]]) -> None:
    """Copy a safetensors file.

    Args:
        path: the file.
        target: where to; nothing is written where no tensor is left.
        changes: by names of tensors, what takes their place.

    Raises:
        InputError: the file is damaged.
    """
    content = Container(path)
    kept: dict[str, tuple[str, list[int], np.ndarray]] = {}
    more: dict[str, tuple[str, list[int], np.ndarray]] = {}
    for one in content.header.tensors:
        if one.name not in changes:
            kept[one.name] = (one.dtype, list(one.shape), content.bytes_of(one))
        for new in changes.get(one.name, ()):
            (kept if new.name == one.name else more)[new.name] = (new.dtype, list(new.data.shape), new.data)
    tensors = kept | more
    if not tensors:
        return
    header: dict[str, object] = {"__metadata__": dict(content.header.metadata)} if content.header.metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + data.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def write_shards(path: Path, target: Path, changes: Mapping[str, list[New]], sizes: Mapping[str, int]) -> None:
    """Copy the index of a file in shards.

    Args:
        path: the index.
        target: where to.
        changes: as for `write_reduced`.
        sizes: bytes of the tensors that are dropped.
    """
    index = read_json(path)
    shards: dict[str, str] = {}
    for name, shard in index["weight_map"].items():
        shards |= dict.fromkeys([one.name for one in changes[name]] if name in changes else [name], shard)
    total = index.get("metadata", {}).get("total_size")
    if isinstance(total, int):
        lost = sum(
            sizes[name] - sum(one.data.nbytes for one in changes[name])
            for name in index["weight_map"]
            if name in changes
        )
        index["metadata"]["total_size"] = total - lost
    write_json(target, {**index, "weight_map": shards})
