"""Compact files: what is packed comes back byte for byte, loads, and is refused when it is damaged."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from command_lines import ROOT, fit, predict
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import sdprune as package
from sdprune.errors import InputError
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
    assert by_hand(compact) == {name: data for name, (_, _, data) in tensors.items()}
    assert page_reader()(compact) == by_hand(compact)


def by_hand(path):
    """The tensors' bytes, element by element, as docs/compact.md describes the format."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:start])
    header = json.loads(entries.pop("__metadata__")["header"])
    header.pop("__metadata__", None)

    def part(key):
        begin, end = entries[key]["data_offsets"]
        return content[start + begin : start + end]

    found = {}
    for name, entry in header.items():
        elements = int(np.prod(entry["shape"], dtype=object))
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        width = size // elements if elements else 1
        mask = None
        if f"mask:{name}" in entries:
            mask = part(f"mask:{name}")
        elif f"mask.zstd:{name}" in entries:
            mask = zstandard.decompress(part(f"mask.zstd:{name}"))
        split = f"values.zstd:{name}" in entries
        values = zstandard.decompress(part(f"values.zstd:{name}")) if split else part(f"values:{name}")
        if mask is None and not split:
            found[name] = values
            continue
        dense, used = [], 0
        for begin in range(0, elements, 1_048_576):
            places = range(begin, min(begin + 1_048_576, elements))
            stored = [mask is None or mask[i // 8] >> (i % 8) & 1 == 1 for i in places]
            count, nth = sum(stored), 0
            for one in stored:
                for byte in range(width):
                    if not one:
                        dense.append(0)
                    elif split:
                        dense.append(values[used + byte * count + nth])
                    else:
                        dense.append(values[used + nth * width + byte])
                nth += one
            used += count * width
        assert used == len(values)
        found[name] = bytes(dense)
    return found


def page_reader():
    """The reader that the page shows."""
    (snippet,) = re.findall(
        r"```python\n(# read_compact.py\n.*?)```", (ROOT / "docs" / "compact.md").read_text(), re.DOTALL
    )
    names = {}
    exec(snippet, names)
    return names["read"]


@pytest.mark.parametrize("compress", [False, True])
def test_tensors_of_several_blocks(tmp_path, compress):
    tensors = {
        "masked": ("F16", [3, 700_001], random_bytes("F16", 2_100_003, 0.4)),
        "one kind of byte": ("BF16", [2**20 + 8], b"\0\x3f" * (2**20 + 8)),
        "a block of zeros": ("F32", [2**20 + 1], bytes(2**22) + b"abcd"),
    }
    path = write(tmp_path / "dense" / "model.safetensors", tensors)
    compact, back = there_and_back(path, tmp_path, compress)
    assert back.read_bytes() == path.read_bytes()
    expected = {name: data for name, (_, _, data) in tensors.items()}
    assert page_reader()(compact) == expected
    assert by_hand(compact) == expected


@pytest.mark.parametrize("compress", [False, True])
def test_bits_of_numbers_are_kept(tmp_path, compress):
    """-0.0 is no zero, and NaN keeps its payload."""
    numbers = torch.tensor([0x8000, 0x7E01, 0xFFFF, 0x7C00, 0x0001, 0x8001] + [0] * 3000, dtype=torch.uint16)
    tensors = {"half": numbers.view(torch.float16), "brain": numbers.clone().view(torch.bfloat16)}
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    compact, back = there_and_back(tmp_path / "dense" / "model.safetensors", tmp_path, compress)
    assert compact
    for name, tensor in load_file(back).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint16), numbers)


LAYOUTS = {
    "spaces": lambda header: json.dumps(header, indent=3) + " " * 13,
    "metadata last": lambda header: json.dumps(dict(reversed(header.items()))),
    "escapes": lambda header: json.dumps(header, ensure_ascii=True),
    "letters": lambda header: json.dumps(header, ensure_ascii=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_headers_and_names_come_back(tmp_path, layout):
    zeros = ("I16", [8192], bytes(16384))
    names = [
        "a",
        "mask:a",
        "values:a",
        "mask.zstd:a",
        "values.zstd:a",
        "header",
        "",
        'ü\u2028\n"\\',
        "a:b",
        "x.compact",
    ]
    tensors = {name: (zeros[0], zeros[1], struct.pack("<h", i) + zeros[2][2:]) for i, name in enumerate(names)}
    metadata = {"format": "pt", "ключ": "значение \0"}
    path = write(tmp_path / "dense" / "model.safetensors", tensors, metadata, LAYOUTS[layout])
    with safe_open(path, "np") as content:
        assert sorted(content.keys()) == sorted(names)
    compact, back = there_and_back(path, tmp_path)
    assert compact.stat().st_size < 30_000
    assert back.read_bytes() == path.read_bytes()
    assert by_hand(compact) == {name: data for name, (_, _, data) in tensors.items()}


def test_what_is_no_smaller_stays_plain(tmp_path):
    path = write(tmp_path / "dense" / "model.safetensors", {"w": ("U8", [5000], random_bytes("U8", 5000, 0))})
    compact, plain = there_and_back(path, tmp_path)
    assert compact is None
    assert plain.read_bytes() == path.read_bytes()


def test_sizes_come_near_what_entropy_allows(tmp_path):
    """35 % zeros of fp16: mask .0585 + values .5013 of dense, by the trial on Gaussian weights."""
    weights = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    weights[weights.abs() < 0.4538] = 0
    (tmp_path / "dense").mkdir()
    save_file({"w": weights.half()}, tmp_path / "dense" / "model.safetensors")
    dense = (tmp_path / "dense" / "model.safetensors").stat().st_size
    for compress, most in ((False, 0.7135), (True, 0.565)):
        compact, _ = there_and_back(tmp_path / "dense" / "model.safetensors", tmp_path, compress)
        assert compact.stat().st_size < most * dense


# --- models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(miniature, tmp_path_factory):
    """A pruned miniature as `fit` saves it, and the same packed by the command line."""
    from sdprune.__main__ import main

    directory = tmp_path_factory.mktemp("pruned")
    assert main([str(one) for one in fit("prune", directory, f"--model.directory={directory / 'plain'}")]) == 0
    assert main(["pack", str(directory / "plain"), "--out", str(directory / "packed")]) == 0
    return directory / "plain", directory / "packed"


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_pruned_pipeline_is_packed_and_unpacked(sdprune, pruned, tmp_path):
    plain, packed = pruned
    told = sdprune("unpack", packed, "--out", tmp_path / "back")
    assert (told.code, told.err) == (0, "")
    assert contents(tmp_path / "back") == contents(plain)
    sizes = [sum(map(len, contents(one).values())) for one in (plain, packed)]
    assert sizes[1] < 0.9 * sizes[0]
    assert not [path for path in packed.rglob("*.safetensors") if not path.name.endswith(".compact.safetensors")]
    told = sdprune("pack", plain, f"--out={tmp_path / 'raw'}", "--compression=none")
    assert told.code == 0
    assert f"({sum(map(len, contents(tmp_path / 'raw').values())) / sizes[0]:.3f})" in told.out.splitlines()[-1]
    assert re.search(r"unet/diffusion_pytorch_model.safetensors: [\d.]+ MB -> [\d.]+ MB \(0.\d{3}\)", told.out)
    assert not zstd_entries(tmp_path / "raw")
    assert zstd_entries(packed)


def zstd_entries(directory):
    return [
        key
        for path in directory.rglob("*.compact.safetensors")
        for key in safe_open(path, "np").keys()  # noqa: SIM118
        if key.startswith(("mask.zstd:", "values.zstd:"))
    ]


def test_a_packed_pipeline_loads_in_python(pruned):
    plain, packed = pruned
    pipe, expected = package.load(packed), StableDiffusionPipeline.from_pretrained(plain)
    assert isinstance(pipe, StableDiffusionPipeline)
    for name in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(one, name).state_dict() for one in (pipe, expected))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert next(package.load(str(packed), torch.float16).unet.parameters()).dtype == torch.float16


def test_the_pictures_of_a_packed_pipeline_are_the_same(sdprune, pruned, tmp_path):
    pictures = []
    for number, model in enumerate(pruned):
        told = sdprune(
            *predict(tmp_path / str(number), f"--model.pipeline.model={model}", "--model.prune={}", "--data.n=3")
        )
        assert told.code == 0, told.err
        pictures.append([path.read_bytes() for path in sorted((tmp_path / str(number)).glob("*/images/*.png"))])
    assert len(pictures[0]) >= 3
    assert pictures[0] == pictures[1]


def test_shards_and_variants_load(pruned, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(pruned[0], torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "plain", variant="fp16", max_shard_size="1MB")
    assert len(list(tmp_path.glob("plain/unet/*-of-*.safetensors"))) > 2
    pack(tmp_path / "plain", tmp_path / "packed")
    assert len(list(tmp_path.glob("packed/unet/*-of-*.compact.safetensors"))) > 2
    found = package.load(tmp_path / "packed", torch.float16, variant="fp16")
    for name in ("unet", "text_encoder"):
        wanted = getattr(pipe, name).state_dict()
        assert all(torch.equal(one, wanted[key]) for key, one in getattr(found, name).state_dict().items())


def test_libraries_that_do_not_know_compact_files_say_so(pruned):
    for cls, part in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        with pytest.raises(OSError, match="no file named"):
            cls.from_pretrained(pruned[1] / part)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "has no model_index.json"),
        ("[1]", "names no pipeline class"),
        ('{"_class_name": ["my_module", "Pipeline"]}', "names no pipeline class"),
        ('{"_class_name": "KolorsPipeline"}', "'KolorsPipeline', which is not supported"),
        ('{"_class_name": "StableDiffusionXLPipeline"}', "damaged: it has None for"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, index, words):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(InputError, match=words):
        package.load(tmp_path)


def test_nothing_is_left_of_loading(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    package.load(pruned[1])
    assert not list(tmp_path.iterdir())


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A small file, packed without compression and with it, and its bytes."""
    halves = np.random.default_rng(0).standard_normal((2, 10_000)).astype(np.float16)
    halves[np.abs(halves) < 0.6] = 0
    few = np.random.default_rng(1).integers(1, 5, 1998).astype(np.float32)
    tensors = {
        "half": ("F16", [100, 100], halves[0].tobytes()), "bias": ("F32", [40], random_bytes("F32", 40, 0)),
        "zeros": ("BF16", [2003], bytes(4006)), "again": ("F16", [100, 100], halves[1].tobytes()),
        "few": ("F32", [1998], few.tobytes()), "scalar": ("I64", [], bytes(8)),
    }  # fmt: skip
    path = write(tmp_path / "plain" / "model.safetensors", tensors, {"format": "pt"})
    compact = []
    for name, compress in (("raw", False), ("zstd", True)):
        pack(path.parent, tmp_path / name, compress)
        compact.append(tmp_path / name / "model.compact.safetensors")
    return compact, path.read_bytes()


def take_apart(content):
    """Entries, and the bytes of each, of a safetensors file."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:start])
    return entries, content[start:]


def put_together(entries, data):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


class Forged:
    """A compact file that can be changed so that everything but the change fits."""

    def __init__(self, path):
        self.path = path
        self.entries, data = take_apart(path.read_bytes())
        self.metadata = self.entries.pop("__metadata__")
        self.header, self.digests = json.loads(self.metadata["header"]), json.loads(self.metadata["sha256"])
        self.parts = {key: data[slice(*entry["data_offsets"])] for key, entry in self.entries.items()}
        self.whole = dict(self.parts)

    def save(self):
        text = json.dumps(self.header)
        self.metadata |= {"header": text, "header_sha256": hashlib.sha256(text.encode()).hexdigest()}
        self.metadata["sha256"] = json.dumps(self.digests)
        end, entries = 0, {"__metadata__": self.metadata}
        for key, data in self.parts.items():
            dtype, shape = (self.entries.get(key, {}).get(field) for field in ("dtype", "shape"))
            if len(data) != len(self.whole.get(key, b"")):
                dtype, shape = dtype or "U8", [len(data) // (BITS[dtype or "U8"] // 8)]
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(data)]}
        self.path.write_bytes(put_together(entries, b"".join(self.parts.values())))

    def grow(self, name, shape):
        """Make a tensor another size in the header of the original file."""
        entry, width = self.header[name], {"BF16": 2, "F16": 2, "F32": 4}[self.header[name]["dtype"]]
        entry["shape"], old = shape, entry["data_offsets"][1]
        more = int(np.prod(shape, dtype=object)) * width - (old - entry["data_offsets"][0])
        for one in self.header.values():
            if "data_offsets" in one and one["data_offsets"][1] >= old:
                one["data_offsets"] = [end + more * (end >= old) for end in one["data_offsets"]]


def flip(data, place, bits=1):
    place %= len(data)
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def frame_of(size, content=b"x"):
    """A frame that says it has `size` bytes, and has few."""
    frame = zstandard.ZstdCompressor(level=1).compress(content)
    assert frame[4] >> 6 == 0
    return frame[:4] + bytes([0xE0]) + struct.pack("<Q", size) + frame[6:]


def bomb(forged):
    """A small frame that says it is the mask of 32 TB."""
    forged.grow("zeros", [2**44])
    forged.parts["mask.zstd:zeros"] = frame_of(2**41)
    del forged.parts["mask:zeros"]


def widen(forged, key):
    """Values in a frame that asks for a window of 128 MiB."""
    values = zstandard.decompress(forged.parts[key])
    wide = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    frame = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    frame = frame.compress(values) + frame.flush()
    assert (frame[4] >> 5, frame[5]) == (0, (27 - 10) << 3)  # no size, and the window
    size = struct.pack("<Q", len(values))
    forged.parts[key] = frame[:4] + bytes([frame[4] | 0xC0]) + frame[5:6] + size + frame[6:]


def altered(key, change):
    def alter(forged):
        forged.parts[key] = change(forged.parts[key])

    return alter


def swapped(*pairs):
    def swap(forged):
        for one, other in pairs:
            forged.parts[one], forged.parts[other] = forged.parts[other], forged.parts[one]

    return swap


def added(key):
    return lambda forged: forged.parts.update({key: b"abc"})


def without(key):
    return lambda forged: forged.parts.pop(key)


def grown(name, *shape):
    return lambda forged: forged.grow(name, list(shape))


def entry(**values):
    return lambda forged: forged.header["bias"].update(values)


RAW, ZSTD = 0, 1
MISMATCH = "does not have its checksum"
DAMAGE = {
    "a bit of the values": (RAW, altered("values:bias", lambda data: flip(data, 7)), f"'bias' {MISMATCH}"),
    "a bit of the mask": (RAW, altered("mask:zeros", lambda data: flip(data, 7)), "'zeros'.*0 bytes, expected 2"),
    "a bit behind the mask": (RAW, altered("mask:zeros", lambda data: flip(data, -1, 128)), "'zeros'.*mask is longer"),
    "a short mask": (RAW, altered("mask:zeros", lambda data: data[:-1]), "'zeros'.*250 bytes, expected 251"),
    "a short tensor": (RAW, altered("values:bias", lambda data: data[:-4]), "'bias'.*156 bytes, expected 160"),
    "values of another": (RAW, swapped(("values:half", "values:again")), "'half'.*expected"),
    "all of another": (
        ZSTD, swapped(("values.zstd:half", "values.zstd:again"), ("mask:half", "mask:again")),
        f"'half' {MISMATCH}",
    ),
    "a missing tensor": (RAW, without("values:bias"), "'bias' is missing"),
    "a missing mask": (RAW, without("mask:again"), "'again'.*expected 20,000"),
    "one tensor more": (RAW, added("values:more"), "'values:more' is part of no tensor"),
    "both kinds of values": (RAW, added("values.zstd:bias"), "'values.zstd:bias' is part of no tensor"),
    "a missing checksum": (RAW, lambda forged: forged.digests.pop("scalar"), f"'scalar' {MISMATCH}"),
    "no checksums": (RAW, lambda forged: setattr(forged, "digests", []), "checksums are no object"),
    "another shape": (RAW, grown("bias", 41), "'bias'.*160 bytes, expected 164"),
    "a frame cut off": (ZSTD, altered("values.zstd:few", lambda data: data[:-9]), "'few' cannot be read"),
    "a frame that is none": (ZSTD, altered("values.zstd:few", lambda data: b"abcdefgh" * 99), "'few' cannot be read"),
    "a frame of another size": (ZSTD, altered("values.zstd:few", lambda _: frame_of(2**50) * 40), "'few'.*ed 7,992"),
    "a frame that holds less": (ZSTD, altered("values.zstd:few", lambda _: frame_of(7992) * 40), "'few' cannot be"),
    "a large tensor": (RAW, grown("zeros", 2**44), "'zeros' takes .* bytes, too many for the 251"),
    "a zstd bomb": (ZSTD, bomb, "'zeros' takes .* bytes, too many for the"),
    "a shape that overflows": (RAW, entry(shape=[2**40, 2**40]), "'bias' has a shape that overflows"),
    "a negative side": (RAW, entry(shape=[-2, -20]), "'bias' has an impossible shape"),
    "a side that is no integer": (RAW, entry(shape=[40.0]), "'bias' has an impossible shape"),
    "a side that is true": (RAW, entry(shape=[True, 40]), "'bias' has an impossible shape"),
    "an unknown dtype": (RAW, entry(dtype="F23"), "'bias' has the unknown dtype 'F23'"),
    "an overlap": (RAW, entry(data_offsets=[19998, 20158]), "'bias' begins at byte 19998, and .* ends at 20000"),
    "no offsets": (RAW, lambda forged: forged.header["bias"].pop("data_offsets"), "'bias' lacks"),
    "a newer version": (RAW, lambda forged: forged.metadata.update(version="2"), "version '2'; this sdprune reads '1'"),
    "another format": (RAW, lambda forged: forged.metadata.update(format="pt"), "is no compact file"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_name_and_costs_no_memory(sdprune, small, tmp_path, case):
    kind, change, words = DAMAGE[case]
    path = small[0][kind]
    forged = Forged(path)
    forged.save()
    assert sdprune("unpack", path.parent, "--out", tmp_path / "whole").code == 0  # the change alone is what is refused
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 10_000
    change(forged)
    forged.save()
    tracemalloc.start()
    told = sdprune("unpack", path.parent, "--out", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told.code == 2, told.out
    assert told.err.startswith(f"sdprune: error: {path}")
    assert told.err.count("\n") == 1
    assert re.search(words, told.err), told.err
    assert peak < 2**22
    assert not [one for one in tmp_path.iterdir() if "out" in one.name]


def test_a_frame_that_asks_for_much_memory(sdprune, tmp_path):
    numbers = np.random.default_rng(0).integers(1, 3, 2**20 + 9).astype(np.float32)
    path = write(tmp_path / "in" / "model.safetensors", {"w": ("F32", [len(numbers)], numbers.tobytes())})
    pack(path.parent, tmp_path / "packed")
    forged = Forged(tmp_path / "packed" / "model.compact.safetensors")
    widen(forged, "values.zstd:w")
    forged.save()
    told = sdprune("unpack", tmp_path / "packed", "--out", tmp_path / "out")
    assert_refused(told, "tensor 'w' cannot be read", "too much memory")


CONTAINERS = {
    "nothing": (b"", "damaged"),
    "seven bytes": (b"1234567", "damaged"),
    "a long header": (struct.pack("<Q", 2**62) + b"{}", "a header of 4,611,686,018,427,387,904 bytes"),
    "no JSON": (struct.pack("<Q", 3) + b"{]}", "damaged"),
    "a list": (struct.pack("<Q", 2) + b"[]", "no object"),
    "deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, "damaged"),
    "no text": (struct.pack("<Q", 3) + b"\xff{}", "damaged"),
    "half a pair": (put_together({"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, b""), "damaged"),
    "twice": (struct.pack("<Q", 15) + b'{"a":1, "a": 2}', "'a' stands in the header twice"),
    "metadata of numbers": (put_together({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "surplus": (
        put_together({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"abc"),
        "take 2 bytes, and 3",
    ),
    "a gap": (
        put_together({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"abc"),
        "'a' begins at byte 1",
    ),
}


@pytest.mark.parametrize("case", CONTAINERS)
@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_files_that_are_no_safetensors(sdprune, tmp_path, verb, case):
    content, words = CONTAINERS[case]
    name = {"pack": "model.safetensors", "unpack": "model.compact.safetensors"}[verb]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    assert_refused(sdprune(verb, tmp_path / "in", "--out", tmp_path / "out"), name, words)
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


def assert_refused(told, *words):
    assert told.code == 2, (told.out, told.err)
    assert told.err.startswith("sdprune: error: ")
    assert told.err.count("\n") == 1
    for word in words:
        assert word in told.err, told.err


def mutations(content, seed):
    """Damage of all kinds, one after another."""
    dice = random.Random(seed)
    start = 8 + struct.unpack("<Q", content[:8])[0]
    while True:
        kind = dice.randrange(6)
        if kind == 0:
            yield flip(content, dice.randrange(len(content)), 1 << dice.randrange(8))
        elif kind == 1:
            yield flip(content, dice.randrange(start, len(content)), dice.randrange(1, 256))
        elif kind == 2:
            yield content[: dice.randrange(len(content))]
        elif kind == 3:
            begin = dice.randrange(len(content))
            yield content[:begin] + dice.randbytes(dice.randrange(1, 9)) + content[begin + dice.randrange(9) :]
        else:
            entries, data = take_apart(content)
            for _ in range(dice.randrange(1, 3)):
                change_header(entries, dice)
            yield put_together(entries, data)


NUMBERS = [0, 1, -1, 7, 8, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, 1.5, True, None, "1", [1], {}]


def change_header(entries, dice):
    """One change of the container's header, or of the original one within it."""
    metadata = entries.get("__metadata__", {})
    kind = dice.randrange(8)
    if kind == 0 and metadata:
        key, text = dice.choice(list(metadata)), dice.choice(list(metadata.values()))
        metadata[key] = dice.choice([metadata[key][:-1], "", "{}", "[]", metadata[key] + " ", text])
        return
    if kind == 1 and metadata.get("header", "").startswith("{"):
        header = json.loads(metadata["header"])
        change_header(header, dice)
        metadata["header"] = json.dumps(header)
        return
    names = [name for name, one in entries.items() if name != "__metadata__" and isinstance(one, dict)]
    if len(names) < 2:
        return
    one, other = dice.sample(names, 2)
    field = dice.choice(["dtype", "shape", "data_offsets"])
    if kind in (2, 3) and field in entries[one] and field in entries[other]:
        entries[one][field], entries[other][field] = entries[other][field], entries[one][field]
    elif kind == 4:
        entries[one], entries[other] = entries[other], entries[one]
    elif kind == 5:
        entries[one][field] = dice.choice([*NUMBERS, [dice.choice(NUMBERS), dice.choice(NUMBERS)], "F32", "F4", "U8"])
    elif kind == 6:
        entries[dice.choice([one + "x", other, "", "mask:" + one])] = entries.pop(one)
    else:
        del entries[one]


@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_mutations(sdprune, small, tmp_path, seed):
    """Each is refused in one line, or gives the exact content."""
    path, refused = small[0][seed], 0
    for number, mutated in zip(range(500), mutations(path.read_bytes(), seed), strict=False):
        path.write_bytes(mutated)
        told = sdprune("unpack", path.parent, "--out", tmp_path / "out")
        if told.code == 0:
            assert (tmp_path / "out" / "model.safetensors").read_bytes() == small[1], number
            shutil.rmtree(tmp_path / "out")
            continue
        assert_refused(told, str(path))
        refused += 1
        assert not [one for one in tmp_path.iterdir() if "out" in one.name]
    assert refused > 450


def test_headers_that_somebody_mended(sdprune, small, tmp_path):
    """A changed original header with a checksum that fits is either refused in one line, or what comes out."""
    path, dice, refused = small[0][ZSTD], random.Random(3), 0
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(content)
        forged = Forged(path)
        change_header(forged.header, dice)
        forged.save()
        told = sdprune("unpack", path.parent, "--out", tmp_path / "out")
        if told.code:
            assert_refused(told, str(path))
            refused += 1
            continue
        assert take_apart((tmp_path / "out" / "model.safetensors").read_bytes())[0] == forged.header
        shutil.rmtree(tmp_path / "out")
    assert refused > 200


def test_mutations_through_the_loader(pruned, tmp_path):
    packed = Path(shutil.copytree(pruned[1], tmp_path / "packed"))
    path = packed / "text_encoder" / "model.compact.safetensors"
    expected = load_file(pruned[0] / "text_encoder" / "model.safetensors")
    refused = 0
    for _, mutated in zip(range(40), mutations(path.read_bytes(), 2), strict=False):
        path.write_bytes(mutated)
        try:
            found = package.load(packed).text_encoder.state_dict()
            assert all(torch.equal(found[key], expected[key]) for key in found)
        except InputError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
    assert refused > 35


# --- directories --------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    path = write(tmp_path / "plain" / "unet" / "model.safetensors", {"w": ("F32", [5000], bytes(20_000))})
    (tmp_path / "plain" / "model_index.json").write_text("{}")
    return path.parents[1]


def test_packing_twice_and_unpacking_what_is_plain(sdprune, plain, tmp_path):
    assert sdprune("pack", plain, "--out", tmp_path / "packed").code == 0
    assert_refused(
        sdprune("pack", tmp_path / "packed", "--out", tmp_path / "more"), "packed already", "unpack it first"
    )
    assert_refused(sdprune("unpack", plain, "--out", tmp_path / "more"), "nothing to unpack")
    renamed = plain / "unet" / "model.safetensors"
    shutil.copy(tmp_path / "packed" / "unet" / "model.compact.safetensors", renamed)
    assert_refused(sdprune("pack", plain, "--out", tmp_path / "more"), "compact file under another name", str(renamed))
    shutil.copy(renamed, tmp_path / "packed" / "unet" / "model.safetensors")
    assert_refused(sdprune("unpack", tmp_path / "packed", "--out", tmp_path / "more"), "has both")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing", "--out", "out"], "missing is no directory"),
        (["empty", "--out", "out"], "has no safetensors to pack"),
        (["plain"], "--out is missing"),
        (["plain", "--out="], "--out: the path is empty"),
        (["plain", "--out", "plain/packed"], "inside of plain"),
        (["plain", "--out", "plain"], "inside of plain"),
        (["plain", "--out", "."], "which holds something"),
        (["plain", "--out", "plain/model_index.json/x"], "inside of plain"),
        (["plain", "--out", "file/x"], "Choose another --out"),
        (["plain", "--out", "link"], "which holds something"),
        (["plain", "--outt=out"], "Did you mean '--out'"),
        (["plain", "--out=out", "--compression=zip"], "invalid choice: 'zip'"),
        (["links", "--out=out"], "links/away is no file and no directory of its own"),
        (["pipe", "--out=out"], "pipe/waits is no file and no directory of its own"),
    ],
)
def test_directories_that_cannot_be_used(sdprune, plain, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "links", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "links" / "away").symlink_to(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe" / "waits")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(sdprune("pack", *arguments), words)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_to_files_as_the_hub_keeps_them(sdprune, plain, tmp_path):
    file = plain / "unet" / "model.safetensors"
    shutil.move(file, tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    assert sdprune("pack", plain, "--out", tmp_path / "packed").code == 0
    assert sdprune("unpack", tmp_path / "packed", "--out", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "unet" / "model.safetensors").read_bytes() == (tmp_path / "blob").read_bytes()


def test_space_is_looked_at_first(sdprune, plain, pruned, tmp_path, monkeypatch):
    pack(plain, tmp_path / "packed")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10_000))
    for verb, directory in (("pack", "plain"), ("unpack", "packed")):
        told = sdprune(verb, tmp_path / directory, "--out", tmp_path / "out")
        assert_refused(told, "0.00 GB free", "Choose another --out.")
    with pytest.raises(InputError, match="Set TMPDIR"):
        package.load(pruned[1])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["packed", "plain"]


def test_a_full_disk_leaves_nothing(sdprune, plain, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    monkeypatch.setattr(shutil, "copyfile", full)
    told = sdprune("pack", plain, "--out", tmp_path / "out")
    assert (told.code, "no space is left at out" in told.err) == (1, True)
    assert [one.name for one in tmp_path.iterdir()] == ["plain"]


def test_an_interrupted_command_leaves_nothing_that_looks_finished(sdprune, tmp_path):
    for number in range(12):
        write(
            tmp_path / "plain" / f"{number:02}.safetensors",
            {"w": ("F16", [2**24], random_bytes("F16", 2**22, 0.5) * 4)},
        )
    line = [sys.executable, "-m", "sdprune", "pack", str(tmp_path / "plain"), "--out", str(tmp_path / "out")]
    for kind in (signal.SIGKILL, signal.SIGINT):
        running = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
        )  # fmt: skip
        begun = time.time()
        while not [one for one in tmp_path.glob(".out.part/01.*") if one.stat().st_mtime > begun]:
            assert running.poll() is None
            time.sleep(0.002)
        running.send_signal(signal.SIGSTOP)  # so that it is not done before it is interrupted
        if kind == signal.SIGKILL:
            assert_refused(sdprune(*line[3:]), "Another run is writing")
        running.send_signal(kind)
        running.send_signal(signal.SIGCONT)
        error = running.communicate()[1]
        assert not (tmp_path / "out").exists()
    assert running.returncode == 130
    assert "interrupted" in error
    assert [one.name for one in tmp_path.iterdir()] == ["plain"]
    assert sdprune(*line[3:]).code == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "plain"]


LIMITED = """
import re, resource, sys
from pathlib import Path
from sdprune.storage.directory import pack, unpack
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 48 * 2**20,) * 2)
try:
    bytearray(64 * 2**20)
except MemoryError:  # the limit holds
    pack(Path("plain"), Path("out"), sys.argv[1] == "zstd")
    unpack(Path("out"), Path("back"))
"""


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_less_memory_than_a_tensor_takes(tmp_path, compression):
    """A tensor of 128 MiB within 48 MiB beside the mapped file."""
    path = write(
        tmp_path / "plain" / "model.safetensors", {"w": ("F16", [2**26], random_bytes("F16", 2**22, 0.5) * 16)}
    )
    done = subprocess.run([sys.executable, "-c", LIMITED, compression], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == path.read_bytes()
