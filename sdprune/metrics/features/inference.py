"""How every measuring network is run: fp32, no gradients, the same kernels each time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact_inference(device: torch.device) -> Iterator[None]:
    """Run a feature network in plain fp32: no autocast, no TF32, no benchmarked kernels.

    The trainer's precision is a choice about the generating model. A metric that followed it would make scores of
    an fp16 and an fp32 run incomparable, and TF32 convolutions alone move features in the third digit.
    """
    matmul = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
