"""2:4 kernels: which layers are changed, by kernels that are timed by hand. No GPU is needed, and none is measured."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import sdprune
from sdprune.errors import InputError
from sdprune.sparse_kernels import Shape


class ByHand:
    """Sparse products that are faster for the shapes named, and weights that say that they were converted."""

    def __init__(self, *faster: tuple[int, int]) -> None:
        self.faster = faster
        self.asked: list[tuple[int, tuple[int, int]]] = []
        self.converted: list[int] = []

    def time(self, weight, rows):
        self.asked.append((rows, tuple(weight.shape)))
        return 1.0, 0.5 if tuple(weight.shape) in self.faster else 0.97, sum(weight.shape)

    def convert(self, weight, algorithm):
        assert algorithm == sum(weight.shape)
        self.converted.append(weight.data_ptr())
        return weight.clone()


@pytest.fixture
def pipe(miniature):
    return DiffusionPipeline.from_pretrained(miniature / "pipeline", torch_dtype=torch.float32)


def pruned(pipe) -> dict[str, nn.Linear]:
    """The feed-forward and cross-attention layers of the U-Net by name, after 2:4 pruning."""
    sdprune.prune(pipe.unet, granularity="2:4", include=["*.ff.net.*", "*.attn2.to_k"])
    named = {name: one for name, one in pipe.unet.named_modules() if isinstance(one, nn.Linear)}
    return {name: one for name, one in named.items() if ".ff.net." in name or name.endswith(".attn2.to_k")}


def test_only_layers_of_faster_shapes_are_changed(pipe):
    """Each shape is timed once, with the rows that a drawing gives it."""
    layers = pruned(pipe)
    before = {name: one.weight for name, one in pipe.unet.named_modules() if isinstance(one, nn.Linear)}
    bits = {name: weight.clone() for name, weight in before.items()}
    chosen = tuple(next(one for name, one in layers.items() if ".ff.net.2" in name).weight.shape)
    kernels = ByHand(chosen)
    timed = sdprune.use_sparse_kernels(pipe, kernels=kernels)
    changed = {name for name, one in pipe.unet.named_modules() if name in before and one.weight is not before[name]}
    assert changed == {name for name, one in layers.items() if tuple(one.weight.shape) == chosen}
    assert changed
    assert len(kernels.converted) == len(changed)
    assert all(torch.equal(pipe.unet.get_submodule(name).weight, bits[name]) for name in before)
    assert len(kernels.asked) == len(set(kernels.asked)) == len(timed)
    assert sum(one.layers for one in timed) == len(layers)
    assert timed[0].shape.outputs == chosen[0]
    assert timed[0].ratio == 2
    assert "2.00x" in str(timed[0])


def test_rows_are_those_of_a_drawing(pipe):
    """Guided: two images; the text has as many rows as tokens, the picture as positions."""
    pruned(pipe)
    kernels = ByHand()
    with pytest.raises(InputError):
        sdprune.use_sparse_kernels(pipe, kernels=kernels)
    tokens, width = pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim
    text = {rows for rows, (_, inputs) in kernels.asked if inputs == width}
    assert 2 * tokens in text
    size = pipe.unet.config.sample_size
    assert max(rows for rows, _ in kernels.asked) == 2 * size * size


def test_where_nothing_is_faster_the_table_is_told_and_nothing_changed(pipe):
    layers = pruned(pipe)
    before = {name: one.weight for name, one in layers.items()}
    with pytest.raises(InputError, match=r"No layer shape is 1.05 times faster .* nothing was changed: .*1.03x"):
        sdprune.use_sparse_kernels(pipe, kernels=ByHand())
    assert all(one.weight is before[name] for name, one in layers.items())


def test_what_is_refused(pipe):
    with pytest.raises(InputError, match=r"No Linear weight of this pipeline is pruned 2:4: .*granularity"):
        sdprune.use_sparse_kernels(pipe, kernels=ByHand())
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"an NVIDIA GPU of compute capability 8.0 or newer: torch finds no GPU"):
            sdprune.use_sparse_kernels(pipe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_products_are_close():
    """Of one large layer, by cuSPARSELt."""
    from sdprune.sparse_kernels import CuSparseLt

    layer = nn.Linear(1280, 1280, bias=False, device="cuda", dtype=torch.float16)
    sdprune.prune(nn.Sequential(layer), granularity="2:4")
    kernels = CuSparseLt()
    shape = Shape(4096, 1280, 1280)
    dense, sparse, algorithm = kernels.time(layer.weight.detach(), shape.rows)
    assert dense > 0
    assert sparse > 0
    inputs = torch.randn(shape.rows, shape.inputs, device="cuda", dtype=torch.float16)
    expected = inputs.float() @ layer.weight.float().T
    found = nn.functional.linear(inputs, kernels.convert(layer.weight.detach(), algorithm)).float()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
