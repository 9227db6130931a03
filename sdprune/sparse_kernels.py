"""2:4 sparse kernels of a GPU, for the layer shapes in which they are faster there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdprune.errors import InputError
from sdprune.outside import reading


class Shape(NamedTuple):
    """What a kernel is chosen for: the sizes of one matrix product."""

    rows: int
    """Of the input: images times tokens."""
    inputs: int
    outputs: int


class Timed(NamedTuple):
    """One shape on this GPU."""

    shape: Shape
    layers: int
    """That have it."""
    dense: float
    """Seconds a call, the median."""
    sparse: float
    """Seconds a call with the best of cuSPARSELt's algorithms."""
    algorithm: int

    @property
    def ratio(self) -> float:
        """How many times faster the sparse kernel is."""
        return self.dense / self.sparse

    def __str__(self) -> str:
        return (
            f"{self.layers:>4} layers  {self.shape.rows:>6} x {self.shape.inputs:>5} -> {self.shape.outputs:>5}  "
            f"dense {self.dense * 1e6:9.1f} us  2:4 {self.sparse * 1e6:9.1f} us  {self.ratio:5.2f}x"
        )


class Kernels(Protocol):
    """Dense and sparse matrix products of one machine."""

    def time(self, weight: Tensor, rows: int) -> tuple[float, float, int]:
        """Seconds of the dense and of the best sparse product, and that one's algorithm."""
        ...

    def convert(self, weight: Tensor, algorithm: int) -> Tensor:
        """The weight as the sparse kernel takes it."""
        ...


class CuSparseLt:
    """Those of an NVIDIA GPU of compute capability 8.0 or newer, through torch.

    Raises:
        InputError: there is no such GPU, or torch was built without cuSPARSELt.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer: torch finds no GPU.")
        if torch.cuda.get_device_capability() < (8, 0):
            name = torch.cuda.get_device_name()
            raise InputError(f"2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer: {name} is older.")
        if not torch.backends.cusparselt.is_available():
            raise InputError(
                f"torch {torch.__version__} was built without cuSPARSELt: install a CUDA build that has it."
            )

    def time(self, weight: Tensor, rows: int) -> tuple[float, float, int]:  # noqa: D102
        from torch.utils.benchmark import Timer

        inputs = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        # As in torch's tensor subclass, the weight comes first: its product with the inputs' transpose.
        algorithm = int(torch._cslt_sparse_mm_search(torch._cslt_compress(weight), inputs.t()))
        seconds = [
            Timer("linear(inputs, weight)", globals={"linear": functional.linear, "inputs": inputs, "weight": one})
            .blocked_autorange(min_run_time=0.2)
            .median
            for one in (weight, self.convert(weight, algorithm))
        ]
        return seconds[0], seconds[1], algorithm

    def convert(self, weight: Tensor, algorithm: int) -> Tensor:  # noqa: D102
        return torch.sparse.to_sparse_semi_structured(weight, alg_id=algorithm)


def use_sparse_kernels(pipe: Any, at_least: float = 1.05, kernels: Kernels | None = None) -> list[Timed]:
    """Let layers whose weights are pruned 2:4 use the sparse kernels of this GPU, where these are faster.

    One picture is drawn in one step, to see how many rows each layer gets. Each shape is then timed on this GPU, dense
    and sparse. Only layers of a shape in which sparse wins are changed, in place; such a pipeline cannot be saved.

    Args:
        pipe: a diffusers pipeline on a GPU, in fp16 or bf16, from `sdprune.load`.
        at_least: how many times faster the sparse kernel must be.
        kernels: those of this machine; cuSPARSELt's by default.

    Returns:
        What was timed, the most gain first.

    Raises:
        InputError: there is no such GPU, no layer is pruned 2:4, or no shape is faster: then with the table.
    """
    kernels = CuSparseLt() if kernels is None else kernels
    layers = list(_candidates(pipe.components.values()))
    if not layers:
        raise InputError(
            "No Linear weight of this pipeline is pruned 2:4: prune with --model.prune.unet.granularity='2:4'."
        )
    rows = _rows(pipe, layers)
    by_shape: dict[Shape, list[nn.Linear]] = {}
    for layer in layers:
        if layer in rows:
            by_shape.setdefault(Shape(rows[layer], layer.in_features, layer.out_features), []).append(layer)
    timed = []
    for shape, same in by_shape.items():
        with torch.no_grad(), reading(f"2:4 kernels do not take {shape}", "Use fp16 or bf16."):
            timed.append(Timed(shape, len(same), *kernels.time(same[0].weight, shape.rows)))
    timed.sort(key=lambda one: -one.ratio)
    winners = [one for one in timed if one.ratio >= at_least]
    if not winners:
        table = "; ".join(" ".join(str(one).split()) for one in timed)
        raise InputError(
            f"No layer shape is {at_least:g} times faster with 2:4 kernels on this GPU, nothing was changed: {table}."
        )
    for one in winners:
        for layer in by_shape[one.shape]:
            layer.weight = nn.Parameter(kernels.convert(layer.weight.detach(), one.algorithm), requires_grad=False)
    return timed


def _candidates(components: Iterable[Any]) -> Iterator[nn.Linear]:
    """Linear layers of which every four neighbouring inputs have at most two weights that are not zero."""
    for component in components:
        for layer in component.modules() if isinstance(component, nn.Module) else ():
            if type(layer) is nn.Linear and layer.in_features % 4 == 0 and _is_2_4(layer.weight.detach()):
                yield layer


def _is_2_4(weight: Tensor) -> bool:
    return bool(weight.unflatten(1, (-1, 4)).count_nonzero(-1).le(2).all())


def _rows(pipe: Any, layers: Iterable[nn.Linear]) -> dict[nn.Linear, int]:
    """How many rows each layer gets when one picture is drawn; the most of its calls."""
    rows: dict[nn.Linear, int] = {}

    def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        rows[layer] = max(rows.get(layer, 0), args[0].numel() // layer.in_features)

    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with torch.no_grad():
            pipe("a picture", num_inference_steps=1, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    return rows
