"""Compact files: what is packed comes back byte for byte, loads, and is refused when it is damaged."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors import safe_open

from sdprune.storage.directory import pack, unpack

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def write(path, tensors, metadata=None, layout=None):
    """A safetensors file by hand: {name: (dtype, shape, bytes)}; `layout` makes the header's text of its object."""
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(data)]}
    text = (layout or json.dumps)(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values()))
    return path


def random_bytes(dtype, count, zeros, seed=0):
    """Elements of random bits, of which a share is zero."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (count, max(1, BITS[dtype] // 8)), dtype=np.uint8)
    if dtype == "BOOL":
        data &= 1
    data[generator.random(count) < zeros] = 0
    return data.tobytes()[: count * BITS[dtype] // 8]


def there_and_back(path, tmp_path, *options):
    """Pack and unpack a directory by the Python API; the compact file, if it is one, and the file that came back."""
    out, back = tmp_path / "packed", tmp_path / "back"
    for old in (out, back):
        shutil.rmtree(old, ignore_errors=True)
    pack(path.parent, out, *options)
    compact = out / path.name.replace(".safetensors", ".compact.safetensors")
    if not compact.exists():
        assert (out / path.name).read_bytes() == path.read_bytes()
        return None, out / path.name
    unpack(out, back)
    return compact, back / path.name


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_comes_back(tmp_path, dtype, compress):
    tensors = {
        f"{count} {zeros}": (dtype, [count], random_bytes(dtype, count, zeros, seed=count))
        for count in (0, 8, 16, 1000, 5000)
        for zeros in (0, 0.1, 0.5, 1)
    }
    if BITS[dtype] >= 8:
        tensors |= {
            "scalar": (dtype, [], random_bytes(dtype, 1, 0)), "zero": (dtype, [], random_bytes(dtype, 1, 1)),
            "empty": (dtype, [3, 0, 5], b""), "odd": (dtype, [7, 11], random_bytes(dtype, 77, 0.5)),
        }  # fmt: skip
    tensors["zeros enough that it is packed"] = ("F32", [4096], bytes(4 * 4096))
    path = write(tmp_path / "dense" / "model.safetensors", tensors)
    compact, back = there_and_back(path, tmp_path, compress)
    assert back.read_bytes() == path.read_bytes()
    assert compact.stat().st_size < path.stat().st_size - 5_000
    with safe_open(compact, "np") as content:  # it is a safetensors file itself
        assert content.metadata()["format"] == "sdprune-compact"
