"""A tensor as a mask and its non-zero values, and back, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import zstandard

Bytes = np.ndarray
"""One axis of uint8."""

BLOCK = 1 << 20
"""Elements that are encoded together; memory for a few of these is all that is needed."""
RATIO = 100
"""A tensor takes at least this part of its dense size, so that no small file asks for much memory or disk."""
_LEVEL = 1  # higher ones are slower and, on halves of floats, no better
_WINDOW = 1 << 23  # bytes; no frame needs more memory to be read


class Stored(NamedTuple):
    """A part of a tensor, mask or values, as it lies in the file."""

    kind: str
    compressed: bool
    size: int


def blocks(data: Bytes, width: int) -> Iterator[np.ndarray]:
    """Elements of a tensor as unsigned integers, so that only a zero of all bits is 0."""
    elements = data.view(f"<u{width or 1}")
    for begin in range(0, len(elements), BLOCK):
        yield elements[begin : begin + BLOCK]


def encode(data: Bytes, width: int, file: BinaryIO, compress: bool) -> list[Stored]:
    """Write a tensor at the end of a file, in the smallest form.

    Args:
        data: its bytes.
        width: bytes of an element; 0 where it is smaller than a byte, and then the tensor is stored as it is.
        file: open for writing and reading.
        compress: with zstd, where that is smaller.
    """
    if not width:
        return [_write(file, "values", lambda: iter([data]), len(data), None)]
    values = sum(int(np.count_nonzero(block)) for block in blocks(data, width)) * width
    mask, least = mask_size(len(data) // width), -(-len(data) // RATIO)
    split = _split if compress else None
    if mask + values >= len(data):
        return [_write(file, "values", lambda: blocks(data, width), len(data), split, least)]
    kept = _write(file, "values", lambda: (block.compress(block != 0) for block in blocks(data, width)), values, split)
    packed = _write(
        file, "mask", lambda: (np.packbits(block != 0, bitorder="little") for block in blocks(data, width)), mask,
        split, least - kept.size,
    )  # fmt: skip
    return [kept, packed]


def mask_size(elements: int) -> int:
    """Bytes of a mask."""
    return -(-elements // 8)


def _write(
    file: BinaryIO, kind: str, parts: Callable[[], Iterator[np.ndarray]], size: int,
    split: Callable[[np.ndarray], Iterator[Bytes]] | None, least: int = 0,
) -> Stored:  # fmt: skip
    """Write a part; compressed if `split` is given and that takes from `least` to less than `size` bytes."""
    start = file.tell()
    if split is not None and size:
        frame = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=size)
        for part in parts():
            for plane in split(part):
                file.write(frame.compress(plane.data))
                file.write(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))  # each plane has its own code
        file.write(frame.flush())
        if least <= (taken := file.tell() - start) < size:
            return Stored(kind, True, taken)
        file.seek(start)
        file.truncate()
    for part in parts():
        file.write(part.data)
    return Stored(kind, False, size)


def _split(block: np.ndarray) -> Iterator[Bytes]:
    """The lowest bytes of all elements, then the next ones: the exponents of floats are much alike."""
    return ((block >> np.uint8(8 * byte)).astype(np.uint8) for byte in range(block.itemsize))


def _join(planes: Bytes, width: int) -> np.ndarray:
    found = np.zeros(len(planes) // width, f"<u{width}")
    for byte, plane in enumerate(planes.reshape(width, -1)):
        found |= plane.astype(found.dtype) << np.uint8(8 * byte)
    return found


class Part:
    """A part of a tensor that is read from its beginning.

    Args:
        data: its bytes in the file.
        compressed: whether they are a frame of zstd.
        size: bytes that they must hold.

    Raises:
        ValueError: they hold another number of bytes, as far as can be seen.
    """

    def __init__(self, data: Bytes, compressed: bool, size: int) -> None:
        held = zstandard.frame_content_size(data[:18].data) if compressed else len(data)
        if held != size:
            raise ValueError(f"{held:,} bytes, expected {size:,}")
        self.data, self.compressed, self.place = data, compressed, 0
        zstd = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._reader = zstd.stream_reader(data.data) if compressed else None

    def take(self, size: int) -> Bytes:
        """The next bytes."""
        if self._reader is None:
            self.place += size
            return self.data[self.place - size : self.place]
        found = np.empty(size, np.uint8)
        if size and self._reader.readinto(found.data) != size:
            raise ValueError("a frame ends early")
        return found


def decode(width: int, size: int, values: tuple[Bytes, bool], mask: tuple[Bytes, bool] | None) -> Iterator[Bytes]:
    """Read a tensor block by block; everything that sizes can tell is checked before the first one.

    Args:
        width: bytes of an element, or 0.
        size: bytes of the tensor.
        values: their bytes in the file, and whether they are compressed.
        mask: likewise; None where all elements are values.

    Raises:
        ValueError: the parts do not fit each other or the size, or a frame is damaged.
    """
    width = width or 1
    elements = size // width
    if mask is None:
        whole = Part(*values, size)
        for begin in range(0, elements, BLOCK):
            yield _take(whole, min(BLOCK, elements - begin), width).view(np.uint8)
        return
    counted = sum(int(np.count_nonzero(bits)) for bits in _bits(mask, elements))
    kept = Part(*values, counted * width)
    for bits in _bits(mask, elements):
        places = np.flatnonzero(bits.view(bool))  # five times as fast as of numbers
        block = np.zeros(len(bits), f"<u{width}")
        block[places] = _take(kept, len(places), width)
        yield block.view(np.uint8)


def _bits(mask: tuple[Bytes, bool], elements: int) -> Iterator[Bytes]:
    part = Part(*mask, mask_size(elements))
    for begin in range(0, elements, BLOCK):
        count = min(BLOCK, elements - begin)
        bits = np.unpackbits(part.take(mask_size(count)), bitorder="little")
        if bits[count:].any():
            raise ValueError("its mask is longer than it")
        yield bits[:count]


def _take(part: Part, count: int, width: int) -> np.ndarray:
    found = part.take(count * width)
    return _join(found, width) if part.compressed else found.view(f"<u{width}")
