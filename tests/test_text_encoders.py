"""Text encoders of other families: their blocks, and sequential order by replay, beside whole runs."""

from contextlib import nullcontext

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sdprune import gather, prune
from sdprune.calibration.collect import Collector
from sdprune.calibration.requests import Request
from sdprune.calibration.store import MemoryStore
from sdprune.pruning import PruneSpec, find_targets

SPEC = PruneSpec(0.5, criterion="Wanda", order="sequential")


def clip():
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=60,
        projection_dim=12, max_position_embeddings=10, eos_token_id=59, bos_token_id=58, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def t5():
    config = T5Config(
        d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=3, vocab_size=60, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


@pytest.fixture(params=[clip, t5])
def encoder(request):
    torch.manual_seed(0)
    return request.param().eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 60, (2, 10), generator=generator) for _ in range(3)]


def test_blocks_are_the_transformer_blocks(encoder):
    blocks = list(dict.fromkeys(target.block for target in find_targets(encoder)))
    if isinstance(encoder, T5EncoderModel):
        assert blocks == ["encoder.block.0", "encoder.block.1", "encoder.block.2"]
    else:
        assert blocks == [*(f"text_model.encoder.layers.{i}" for i in range(3)), "stem"]


class Chain:
    """A text encoder as calibration sees it, block by block."""

    name, steps, calls_per_batch = "text_encoder", 1, 1

    def __init__(self, module):
        self.module = module

    def run(self, batch, before_step):
        self.module(batch)

    def bring(self):
        pass

    def replays(self, sequential):
        return True

    def replaying(self, before_step):
        return nullcontext(before_step)

    def try_out(self):
        self.module(batches()[0])

    def set_up(self, observer, batch):
        pass


def test_replayed_blocks_give_what_whole_runs_give(encoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    whole = gather(encoder, batches(), SPEC, ["input_norm"])["input_norm"]
    ran: list[int] = []
    stack = encoder.encoder.block if isinstance(encoder, T5EncoderModel) else encoder.text_model.encoder.layers
    hooks = [
        block.register_forward_hook(
            lambda module, args, output, i=i: ran.append(i) if "forward" not in vars(module) else None
        )
        for i, block in enumerate(stack)
    ]
    store, facts = MemoryStore(), {"statistic": "input_norm"}
    request = Request("text_encoder", "input_norm", SPEC, facts, sequential=True)
    collector = Collector({"text_encoder": Chain(encoder)}, [request], store)
    collector.run(lambda: ((batch, index, 2) for index, batch in enumerate(batches())))
    for hook in hooks:
        hook.remove()
    gathered = store.load(facts)
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in gathered.items())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    # Once to see how values go through the blocks, once in whole for every batch, then each block dense and pruned.
    assert len(ran) == len(stack) + 3 * len(stack) + 3 * (
        2 * len(stack) - (1 if isinstance(encoder, T5EncoderModel) else 0)
    )


@pytest.mark.parametrize("criterion", ["Magnitude", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("allocation", ["Uniform", "OWL"])
def test_every_method_prunes_them(encoder, criterion, allocation):
    options = {"criterion": criterion, "allocation": allocation, "order": "sequential"}
    report = prune(encoder, sparsity=0.4, inputs=batches(), **options)
    weights = sum(target.weight.numel() for target in find_targets(encoder))
    if allocation == "OWL":
        assert report.pruned == int(weights * 0.4 + 0.5)
    assert abs(report.pruned - 0.4 * weights) <= len(report.layers) / 2
    with torch.no_grad():
        assert encoder(batches()[0])[0].isfinite().all()
