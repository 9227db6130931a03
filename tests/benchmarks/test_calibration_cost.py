"""What calibration costs: beside a plain forward pass, and beside the published sequential loop.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_calibration_cost.py

runs Stable Diffusion 2's text encoder with random weights, 128 prompts of 77 tokens, and the miniature's U-Net: some
fifteen minutes on two cores. Otherwise a text encoder of toy size shows that both loops prune the same weights.
"""

import os
import statistics
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdprune.calibration.collect import Collector
from sdprune.calibration.observer import InputObserver
from sdprune.calibration.requests import Request
from sdprune.calibration.store import MemoryStore
from sdprune.pruning import InputNorm, PruneSpec, apply, find_targets

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
PROMPTS, BATCH = (128, 32) if FULL else (6, 3)
SIZES = (
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    if FULL
    else {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
)
SPARSITY = 0.5

pytestmark = pytest.mark.usefixtures("threads")


def text_encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(**SIZES, hidden_act="gelu", vocab_size=49408 if FULL else 100)
    return CLIPTextModel(config).eval().requires_grad_(False)


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 90, (PROMPTS, 77), generator=generator)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def published(model, ids, ours):
    """locuslab/wanda's loop: one prompt at a time, each block run twice, every row sorted.

    Every block goes on with our masks, by layer, once its own are chosen: a score on the verge falls to either side by
    rounding, and what that changes in a block would be blamed on those after it.

    Returns:
        Its own masks, by layer.
    """
    chosen = {}
    blocks = model.encoder.layers
    caught = []

    class Caught(Exception):  # noqa: N818
        pass

    def catch(module, args, kwargs):
        caught.append((args[0], args[1:], kwargs))
        raise Caught

    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for one in ids:
        with pytest.raises(Caught):
            model(one[None])
    handle.remove()

    def run(block):
        outputs = [block(hidden, *args, **kwargs) for hidden, args, kwargs in caught]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    for number, block in enumerate(blocks):
        layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        scaler = {name: torch.zeros(module.in_features) for name, module in layers.items()}
        counted = dict.fromkeys(layers, 0)

        def add(module, args, output, name, scaler=scaler, counted=counted):
            x = args[0].reshape(-1, args[0].shape[-1]).t()
            scaler[name] *= counted[name] / (counted[name] + 1)
            counted[name] += 1
            scaler[name] += torch.norm(x.float(), p=2, dim=1) ** 2 / counted[name]

        hooks = [
            module.register_forward_hook(lambda m, a, o, name=name: add(m, a, o, name))
            for name, module in layers.items()
        ]
        run(block)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            metric = module.weight.abs() * torch.sqrt(scaler[name].reshape(1, -1))
            order = torch.sort(metric, dim=-1, stable=True).indices[:, : int(metric.shape[1] * SPARSITY)]
            mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, True)
            chosen[f"encoder.layers.{number}.{name}"] = mask
            module.weight[ours[f"encoder.layers.{number}.{name}"]] = 0
        caught = [(hidden, *rest) for hidden, (_, *rest) in zip(run(block), caught, strict=True)]
    return chosen


def ours(model, ids, record=None):
    """Sequential Wanda through the public parts, in batches."""
    spec = PruneSpec(SPARSITY, criterion="Wanda", order="sequential")
    request = Request("text_encoder", "input_norm", spec, {"statistic": "input_norm"}, sequential=True)
    store = MemoryStore()
    collector = Collector({"text_encoder": Chain(model, ids)}, [request], store)
    collector.run(lambda: ((batch, index, len(batch)) for index, batch in enumerate(ids.split(BATCH))))
    apply(model, spec, {"input_norm": store.load(request.facts)})


class Chain:
    """A text encoder as calibration sees it, block by block."""

    name, steps, calls_per_batch = "text_encoder", 1, 1

    def __init__(self, module, ids):
        self.module, self.ids = module, ids

    def run(self, batch, before_step):
        self.module(batch)

    def bring(self):
        pass

    def replays(self, sequential):
        return True

    def replaying(self, before_step):
        return nullcontext(before_step)

    def try_out(self):
        self.module(self.ids[:1])

    def set_up(self, observer, batch):
        pass


def test_sequential_wanda_against_the_published_loop():
    model, ids = text_encoder(), tokens()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = seconds(lambda: [model(batch) for batch in ids.split(BATCH)])
    took = {"ours": seconds(lambda: ours(model, ids))}
    masks = {target.name: target.weight == 0 for target in find_targets(model)}
    model.load_state_dict(dense)
    theirs = {}
    took["published"] = seconds(lambda: theirs.update(published(model, ids, masks)))
    ratio = took["published"] / took["ours"]
    print(
        f"\nplain forward {plain:.1f} s, ours {took['ours']:.1f} s, published {took['published']:.1f} s: {ratio:.2f} x"
    )
    same = {name: (theirs[name] == mask).float().mean().item() for name, mask in masks.items()}
    print(
        f"masks equal in {min(same.values()):.5%} of a layer at least, {statistics.mean(same.values()):.5%} on average"
    )
    assert min(same.values()) > 0.999  # batches round differently


def test_input_norms_against_a_plain_forward_pass():
    model, ids = text_encoder(), tokens()[: 64 if FULL else 6]
    observer = InputObserver(find_targets(model), InputNorm())

    @torch.no_grad()
    def forward():
        for batch in ids.split(BATCH):
            model(batch)

    def listening():
        with observer.observing():
            forward()
        observer.take()

    forward()
    times = [(seconds(forward), seconds(listening)) for _ in range(5 if FULL else 1)]
    ratio = statistics.median(b / a for a, b in times)
    print(f"\ninput norms of a text encoder: {ratio:.3f} x a plain forward pass ({times[0][0]:.1f} s)")
    assert set(observer.take().totals) == set()
