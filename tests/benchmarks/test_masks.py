"""Time and memory of exact masks on the Linear shapes of Stable Diffusion 2, beside a sort of each layer.

    SDPRUNE_BENCHMARK=1 pytest -n 0 --benchmark-enable -s tests/benchmarks

runs at full size, a few minutes on two cores. Otherwise every width is divided by 32, and the masks are compared with
the sort's instead.
"""

import os
import time
from itertools import accumulate

import pytest
import torch
from torch import nn

from sdprune import prune
from sdprune.pruning import PruneSpec, find_targets, masks

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
SHRINK = 1 if FULL else 32

# (outputs, inputs): how many, as in the published configurations.
TEXT_ENCODER = {(1024, 1024): 4 * 23, (4096, 1024): 23, (1024, 4096): 23}
UNET = {
    (1280, 320): 1, (1280, 1280): 61, (320, 320): 40, (320, 1024): 10, (2560, 320): 5, (320, 1280): 10,
    (640, 640): 40, (640, 1024): 10, (5120, 640): 5, (640, 2560): 5,
    (640, 1280): 5, (1280, 1024): 12, (10240, 1280): 6, (1280, 5120): 6,
}  # fmt: skip
COMPONENTS = {"text_encoder": (TEXT_ENCODER, 289_406_976), "unet": (UNET, 301_219_840)}
SPARSITY = 0.475


def build(name, dtype):
    """The component's Linear layers, in eight blocks, with random weights."""
    shapes, size = COMPONENTS[name]
    assert sum(rows * columns * n for (rows, columns), n in shapes.items()) == size
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.ModuleList() for _ in range(8))
    index = 0
    for (rows, columns), n in shapes.items():
        for _ in range(n):
            layer = nn.Linear(columns // SHRINK, rows // SHRINK, bias=False, dtype=dtype, device="meta")
            blocks[index % 8].append(layer.to_empty(device="cpu"))
            nn.init.normal_(blocks[index % 8][-1].weight, std=0.03)
            index += 1
    return nn.ModuleDict({"down_blocks": blocks})


def peak_extra_bytes(function):
    """The most that tensors made meanwhile hold at a time. Resident memory adds what the C library keeps for reuse."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def consume(targets, spec):
    for _, mask in masks(targets, spec):
        del mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_masks(benchmark, name, dtype):
    component = build(name, dtype)
    targets = find_targets(component)
    largest = max(target.weight.nbytes for target in targets)
    specs = {kind: PruneSpec(SPARSITY, granularity=kind) for kind in ("layer", "component", "module_block", "row")}
    for spec in specs.values():
        consume(targets[:2], spec)  # warms up
    extra = {kind: peak_extra_bytes(lambda spec=spec: consume(targets, spec)) / largest for kind, spec in specs.items()}
    times = {kind: seconds(lambda spec=spec: consume(targets, spec)) for kind, spec in specs.items()}
    benchmark.pedantic(consume, (targets, specs["layer"]), rounds=3 if FULL else 1)
    sort = seconds(lambda: [target.matrix.abs().flatten().sort() and None for target in targets])
    if not FULL:
        check_against_sort(targets, specs)
    whole = {"prune": seconds(lambda: prune(component, specs["layer"]))}
    benchmark.extra_info.update(sort=sort, seconds=times | whole, peak_over_largest_layer=extra)
    print(f"\n{name} {dtype}: sort {sort:.2f} s")
    for kind, took in (times | whole).items():
        peak = f", peak {extra[kind]:.2f} x the largest layer ({largest / 1e6:.0f} MB)" if kind in extra else ""
        print(f"  {kind:13} {took:6.2f} s, {sort / took:5.1f} x{peak}")
    if FULL:
        assert extra["layer"] < 2
        assert extra["component"] < 2
        assert sort > 5 * times["layer"]
        assert sort > 5 * times["component"]


def check_against_sort(targets, specs):
    for target, mask in masks(targets, specs["layer"]):
        assert torch.equal(mask, lowest([target.matrix.abs()])[0])
    wanted = lowest([target.matrix.abs() for target in targets])
    for (_, mask), one in zip(masks(targets, specs["component"]), wanted, strict=True):
        assert torch.equal(mask, one)


def lowest(scores):
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.sort(stable=True).indices[: int(len(flat) * SPARSITY + 0.5)]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
