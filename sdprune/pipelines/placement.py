"""Where the components of a loaded pipeline lie: all where they compute, or one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sdprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

_ALIGNMENT = 64  # bytes, as torch allocates


class Placement:
    """Puts components where they compute.

    Args:
        offload: whether each lies in the memory of the CPU while it does not compute.
    """

    def __init__(self, offload: bool) -> None:
        self.offload = offload

    def check(self, device: torch.device) -> None:
        """Raise InputError where the components are to be offloaded and cannot be."""
        if not self.offload:
            return
        if device.type == "cpu":
            raise InputError(
                "--model.pipeline.offload is true, and this run computes on the CPU, where the components lie anyway: "
                "leave it out, or choose a GPU: --trainer.accelerator=gpu."
            )
        if find_spec("accelerate") is None:
            raise InputError('--model.pipeline.offload needs accelerate: pip install "sdprune[offload]".')

    def place(self, pipe: Any, dtype: torch.dtype, device: torch.device) -> None:
        """Move a pipeline of diffusers."""
        import torch
        from torch import nn

        with torch.inference_mode(False):  # weights that can be changed later
            if self.offload:
                pipe.to(dtype=dtype)
                pipe.enable_model_cpu_offload(device=device)
            else:
                pipe.to(device=device, dtype=dtype)
            for module in pipe.components.values():
                if isinstance(module, nn.Module):
                    _align(module)

    def bring(self, pipe: Any, name: str) -> nn.Module:
        """A component, which lies where it computes until something else runs; alone where components are offloaded."""
        module: nn.Module = pipe.components[name]
        device = pipe._execution_device
        if next(module.parameters()).device != device:
            with self.running(pipe):
                module.to(device)
        return module

    @contextmanager
    def running(self, pipe: Any) -> Iterator[None]:
        """Entered when parts of a pipeline are about to run, which may move weights."""
        import torch

        if not self.offload:
            yield
            return
        with torch.inference_mode(False), torch.no_grad():  # weights that can be changed later
            pipe.maybe_free_model_hooks()  # what was not run to its end has left components there
            yield


def _align(module: nn.Module) -> None:
    """Move weights that a file has put at any place in memory: kernels of the CPU round by how they are aligned."""
    for one in (*module.parameters(), *module.buffers()):
        if one.device.type == "cpu" and one.data_ptr() % _ALIGNMENT:
            one.data = one.data.clone()
