"""Size and speed of compact files on the shapes of Stable Diffusion 2 in fp16, Gaussian weights pruned by magnitude.

    SDPRUNE_BENCHMARK=1 pytest -n 0 --benchmark-enable -s tests/benchmarks/test_pack_speed.py

runs at full size: 3 minutes of CPU time, 8 GB of disk, 4 GB of memory. Otherwise every width is divided by 32.
Beside the sizes stands what entropy allows: for each tensor its mask, by its share of zeros, and its values, by how
often each of them occurs. Speeds are bytes of the plain files by CPU time of one core.
"""

import math
import os
import time
from pathlib import Path
from statistics import NormalDist, median

import pytest
import torch
from diffusers import UNet2DConditionModel
from full_size import TEXT, UNET
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdprune.storage.directory import pack, unpack

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
SHRINK = 1 if FULL else 32
STUDY = {"text_encoder": 0.475, "unet": 0.35}
LEAST = 200e6  # bytes a second


def components():
    with torch.device("meta"):
        return {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)), "unet": UNet2DConditionModel(**UNET)}


def save(directory: Path, everything: bool) -> float:
    """Write both components; returns the bytes that entropy allows."""
    allowed, generator = 0.0, torch.Generator().manual_seed(0)
    for name, model in components().items():
        linear = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, nn.Linear)}
        weights = {}
        for key, parameter in model.named_parameters():
            shape = [max(1, side // SHRINK) if side > 32 else side for side in parameter.shape]
            weight = torch.randn(shape, generator=generator)
            sparsity = 0.385 if everything else STUDY[name] * (key in linear)
            weight[weight.abs() < NormalDist().inv_cdf((1 + sparsity) / 2)] = 0
            weights[key] = (weight / max(1, math.prod(shape[1:])) ** 0.5).half()
            allowed += entropy(weights[key])
        (directory / name).mkdir(parents=True)
        save_file(weights, directory / name / "model.safetensors", {"format": "pt"})
    return allowed


def entropy(weight: torch.Tensor) -> float:
    """Bytes for a mask and the values of a tensor, each element on its own."""
    counts = torch.bincount(weight.flatten().view(torch.uint16).int(), minlength=2**16).double()
    zeros, counts = counts[0], counts[1:][counts[1:] > 0]
    return (bits(torch.stack([zeros, counts.sum()])) + bits(counts)) / 8


def bits(counts: torch.Tensor) -> float:
    counts = counts[counts > 0]
    return float(-(counts * (counts / counts.sum()).log2()).sum())


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def speed(rounds: int, function, directory: Path, out: Path, *options) -> float:
    """Bytes of the plain files a second, the median of several rounds; `out` stays."""
    plain, times = size(directory), []
    for _ in range(rounds):
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        start = time.process_time()
        function(directory, out, *options)
        times.append(time.process_time() - start)
    return max(plain, size(out)) / median(times)


@pytest.mark.parametrize(("everything", "most"), [(False, 0.85), (True, 0.60)], ids=["linear", "all"])
def test_pack(tmp_path, everything, most):
    plain = tmp_path / "plain"
    rounds = 3 if FULL and not everything else 1
    bound = save(plain, everything) / size(plain)
    for compress in (False, True):
        packed, back = tmp_path / f"packed-{compress}", tmp_path / "back"
        to = speed(rounds, pack, plain, packed, compress)
        fro = speed(rounds, unpack, packed, back)
        ratio = size(packed) / size(plain)
        for path in plain.rglob("*.safetensors"):
            assert (back / path.relative_to(plain)).read_bytes() == path.read_bytes()
        print(
            f"\n{'all weights at 38.5 %' if everything else 'Linear weights at 47.5 % / 35 %'}, "
            f"{'zstd' if compress else 'none'}: {size(plain) / 1e6:,.1f} MB, ratio {ratio:.4f} (bound {bound:.4f}), "
            f"pack {to / 1e6:,.0f} MB/s, unpack {fro / 1e6:,.0f} MB/s"
        )
        assert bound < ratio
        if FULL and compress:
            assert ratio <= most
        elif FULL:
            assert min(to, fro) > LEAST
