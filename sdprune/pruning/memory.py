"""Which tensors of a module lie in the same memory."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Region(NamedTuple):
    """The bytes from the first to the last number of a tensor."""

    space: str
    """The device; on the meta device, which has no addresses, the storage."""
    start: int
    stop: int


def region(tensor: Tensor) -> Optional[Region]:
    """The region of a tensor; None where it has none: not initialized, empty, sparse or a wrapper of other tensors."""
    if is_lazy(tensor) or is_wrapper(tensor) or not tensor.numel() or tensor.layout != torch.strided:
        return None
    storage, size = tensor.untyped_storage(), tensor.element_size()
    length = size * (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    start = int(tensor.storage_offset()) * size
    if tensor.is_meta:
        return Region(f"storage {storage._cdata}", start, start + length)
    start += storage.data_ptr()
    return Region(str(tensor.device), start, start + length)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor stands for others, as distributed and quantized ones do."""
    return hasattr(tensor, "__tensor_flatten__")


def overlaps(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Pairs of names of tensors whose regions overlap."""
    regions = [(place, name) for name, tensor in tensors if (place := region(tensor)) is not None]
    open_regions: list[tuple[Region, str]] = []
    for place, name in sorted(regions):
        open_regions = [one for one in open_regions if one[0].space == place.space and one[0].stop > place.start]
        yield from ((other, name) for _, other in open_regions)
        open_regions.append((place, name))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
