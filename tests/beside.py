"""A second device, `beside:0`, that computes on the CPU, to the same bits, and takes no tensors of both in one call.

What goes wrong on a GPU with a program that moves its models is seen without a GPU.
"""

from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from torch import Tensor
from torch.library import Library
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

_MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_ARANGE = torch.ops.aten.arange
_WHOLE = [torch.ops.aten._to_copy.default, _ARANGE.default, _ARANGE.start, _ARANGE.start_step]
"""What torch would take apart into operations that the fallback cannot do."""


class Beside(Tensor):
    """Stands for a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Beside":
        with torch.inference_mode(inner.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=_device(),
            )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        """As of every tensor; torch leaves it to subclasses."""
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        """Where its numbers are."""
        return self.inner.untyped_storage()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:  # torch chooses its kernel by the device
            return _run(func, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.to:  # in inference mode alone it comes here whole
            return func.decompose(*args, **(kwargs or {}))
        if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
            return all(isinstance(one, Beside) for one in args)
        return _run(func, *args, **(kwargs or {}))


def _device() -> torch.device:
    return torch.device("beside", 0)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    wrappers: dict[int, Beside] = {}
    foreign: list[Tensor] = []

    def unwrapped(value: Tensor) -> Tensor:
        if isinstance(value, Beside):
            wrappers[id(value.inner)] = value
            return value.inner
        if value.dim():
            foreign.append(value)
        return value

    args, kwargs = tree_map_only(Tensor, unwrapped, (args, kwargs))
    if wrappers and foreign and func not in _MOVES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found beside and cpu")
    wanted = kwargs.get("device")
    here = func is not torch.ops.aten._to_copy.default or wanted is None or torch.device(wanted).type == "beside"
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*args, **kwargs)
    if not here:
        return found
    return tree_map_only(Tensor, lambda one: wrappers[id(one)] if id(one) in wrappers else Beside(one), found)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


class Accelerator(CPUAccelerator):
    """Of Lightning."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing."""


TRAINER = [
    "--trainer.accelerator=beside", "--trainer.strategy=SingleDeviceStrategy", "--trainer.strategy.device=beside:0"
]  # fmt: skip
"""Options by which a command computes there."""


@cache
def register() -> torch.device:
    """Make the device known to torch; it stays for good."""
    _setup_privateuseone_for_python_backend("beside", _Backend())
    every, aten = Library("_", "IMPL"), Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    for func in _WHOLE:
        aten.impl(func.name(), partial(_run, func), "PrivateUse1")
    _kept.extend([every, aten])
    AcceleratorRegistry.register("beside", Accelerator)
    return _device()


_kept: list[Any] = []
