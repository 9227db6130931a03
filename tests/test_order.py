"""Sequential order against a loop that prunes stage by stage by hand and runs everything again for each."""

import copy
from pathlib import Path

import pytest
import torch
from command_lines import fit, process
from safetensors.torch import load_file
from torch import nn

import sdprune
from sdprune.errors import InputError
from sdprune.pipelines import Sampling, StableDiffusion
from sdprune.pipelines.sampling import image_seed
from sdprune.pruning import PruneSpec


class Middle(nn.Module):
    """A block beside the lists of blocks, with a list of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Shuffled(nn.Module):
    """Registered as a U-Net is, in another order than it runs: conv_in, down, mid, up, conv_out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv_in, self.conv_out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.never = nn.Linear(8, 8)
        self.down_blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.up_blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.mid_block = Middle()

    def forward(self, x):
        x = self.conv_in(x).relu()
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x).relu() + 0.1
        return self.conv_out(x)


ORDER = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block.layers.0", "up_blocks.0", "up_blocks.1", "conv_out"]


def squares(module, batches, names):
    """By layer, the mean over samples of each input's square: one plain hook a layer."""
    seen = {name: [] for name in names}
    layers = {name: module.get_submodule(name) for name in names}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].double()))
        for name, layer in layers.items()
    ]
    for batch in batches:
        module(batch)
    for hook in hooks:
        hook.remove()
    samples = sum(len(batch) for batch in batches)
    return {name: sum(x.square().sum(0) for x in inputs) / samples for name, inputs in seen.items()}


def prune_rows(layer, squared, sparsity):
    """Wanda on a linear layer, row by row, with loops; every row loses equally many here."""
    with torch.no_grad():
        for row in layer.weight:
            scores = [abs(row[j].item()) * squared[j].item() ** 0.5 for j in range(len(row))]
            for j in sorted(range(len(row)), key=lambda j: scores[j])[: round(len(row) * sparsity)]:
                row[j] = 0


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_layers_are_pruned_in_the_order_in_which_they_run(training):
    net = Shuffled()
    batches = [torch.randn(5, 6), torch.randn(3, 6)]
    by_hand = copy.deepcopy(net).eval()
    wanted = {}
    for name in ORDER:
        wanted |= squares(by_hand, batches, [name])
        prune_rows(by_hand.get_submodule(name), wanted[name], 0.5)
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    spec = PruneSpec(0.5, criterion="Wanda", order="sequential", exclude=["never"])
    got = sdprune.gather(net, batches, spec, ["input_norm"])["input_norm"]
    assert set(got) == set(ORDER)
    for name in ORDER:
        torch.testing.assert_close(got[name].flatten().double(), wanted[name], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    sdprune.prune(net, spec, inputs=batches)
    for name in ORDER:
        assert torch.equal(net.get_submodule(name).weight, by_hand.get_submodule(name).weight), name


@pytest.mark.parametrize(
    ("criterion", "granularity"),
    [("Wanda", "layer"), ("Wanda", "row"), ("Wanda", "module_block"), ("SparseGPT", "column_block")],
)
def test_what_sequential_statistics_are_gathered_on_is_what_is_pruned_in_the_end(criterion, granularity):
    """Statistics gathered on the finished model up to each stage are those that it was pruned by."""
    net, batches = Shuffled().eval(), [torch.randn(20, 6)]
    spec = PruneSpec(0.5, criterion=criterion, granularity=granularity, order="sequential", exclude=["never"])
    name = next(iter(spec.criterion.statistics))
    got = sdprune.gather(net, batches, spec, [name])[name]
    sdprune.prune(net, spec, inputs=batches)
    dense = Shuffled().eval()
    if granularity == "module_block":  # the stem is ranked as one group, after its last layer
        net.conv_in.load_state_dict(dense.conv_in.state_dict())
    final = sdprune.gather(net, batches, PruneSpec(0.5, exclude=["never"]), [name])[name]
    for layer in ORDER:
        torch.testing.assert_close(got[layer], final[layer])


def test_gathering_leaves_the_mode_and_the_buffers_of_every_submodule_alone():
    net = Shuffled().train()
    net.mid_block.layers[1].eval()
    modes = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    batches = [torch.randn(7, 6)]
    spec = PruneSpec(0.5, criterion="Wanda", exclude=["never"])
    once, again = (sdprune.gather(net, batches, spec, ["input_norm"])["input_norm"] for _ in range(2))
    with torch.no_grad():
        wanted = squares(copy.deepcopy(net).eval(), batches, ORDER)
    for name in ORDER:
        assert torch.equal(once[name], again[name])  # dropout is off
        torch.testing.assert_close(once[name].flatten().double(), wanted[name], rtol=1e-5, atol=1e-7)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(InputError, match=r"'conv_in' sees inputs of shape \[2, 99\], but has 6 inputs"):
        sdprune.gather(net, [torch.randn(2, 99)], spec, ["input_norm"])
    assert [module.training for module in net.modules()] == modes


class Recurrent(nn.Module):
    """`again` is called three times in a forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = self.again(x)
        return x


def published(calls):
    """Wanda's and SparseGPT's running statistics, as their code adds up one call after another."""
    n, norm, hessian = 0, torch.zeros(6), torch.zeros(6, 6)
    for x in calls:
        b = len(x)
        norm, hessian, n = norm * (n / (n + b)), hessian * (n / (n + b)), n + b
        norm, hessian = norm + x.norm(dim=0) ** 2 / n, hessian + 2 / n * x.T @ x
    return norm, hessian


def test_a_layer_that_is_called_several_times_has_the_published_running_mean():
    net, batches = Recurrent(), [torch.randn(4, 6), torch.randn(2, 6)]
    seen = {"first": [], "again": []}
    with torch.no_grad():
        for x in batches:
            seen["first"].append(x)
            x = net.first(x)
            for _ in range(3):
                seen["again"].append(x)
                x = net.again(x)
    got = sdprune.gather(net, batches, PruneSpec(0.5), ["input_norm", "hessian"])
    scores = []
    for name in ("first", "again"):
        norm, hessian = published(seen[name])
        torch.testing.assert_close(got["input_norm"][name].flatten(), norm, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got["hessian"][name][0], hessian, rtol=1e-5, atol=1e-6)
        scores += (net.get_submodule(name).weight.detach().abs() * norm.sqrt()).flatten().tolist()
    lowest = set(sorted(range(72), key=lambda i: scores[i])[:36])
    sdprune.prune(net, sparsity=0.5, criterion="Wanda", granularity="component", inputs=batches)
    zero = torch.cat([net.first.weight.flatten(), net.again.weight.flatten()]) == 0
    assert set(zero.nonzero().flatten().tolist()) == lowest


# --- the whole pipeline ---------------------------------------------------------------------------------------

STAGES = [
    ["conv_in", "time_embedding."], ["down_blocks.0."], ["down_blocks.1."], ["mid_block."], ["up_blocks.0."],
    ["up_blocks.1."], ["conv_out"],
]  # fmt: skip
TEXT = [f"model.prune.text_encoder.{option}" for option in ("sparsity=0.5", "criterion=Wanda", "order=sequential")]
UNET = [
    f"model.prune.unet.{option}"
    for option in ("sparsity=0.5", "criterion=Wanda", "granularity=layer", "order=sequential")
]
OPTIONS = [f"--{option}" for option in (*TEXT, *UNET, "model.prune.unet.layers=[Linear, Conv2d]")]


def columns(layer, x):
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    unfolded = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return unfolded.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def stage_by_stage(prompts, seeds):
    """By layer, mean squares by step, from a U-Net in which everything before the layer's stage is pruned."""
    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    unet = model.components["unet"]
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    found = {}
    for stage in STAGES:
        here = {name: layer for name, layer in layers.items() if name.startswith(tuple(stage))}
        steps = {name: [] for name in here}
        hooks = [
            layer.register_forward_pre_hook(
                lambda layer, args, seen=steps[name]: seen.append(columns(layer, args[0]).double().square().sum(0))
            )
            for name, layer in here.items()
        ]
        for i in range(0, len(prompts), 2):
            model.generate(prompts[i : i + 2], seeds[i : i + 2], Sampling(steps=2, guidance=2.5), decode=False)
        for hook in hooks:
            hook.remove()
        for name, layer in here.items():
            found[name] = torch.stack([sum(steps[name][step::2]) for step in range(2)]) / len(prompts)
            scores = layer.weight.abs() * found[name].mean(0).float().sqrt().view(1, *layer.weight.shape[1:])
            lowest = scores.flatten().argsort(stable=True)[: int(scores.numel() * 0.5 + 0.5)]
            layer.weight.view(-1)[lowest] = 0
    return found


def calibration():
    from sdprune.mini.source import EmbeddedWorld

    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    return list(source.load()["caption"])[:4], [image_seed(0, f"calibration:{i}") for i in range(4)]


def stored(output: Path):
    files = sorted((output / "statistics").glob("unet-input_norm-*/*.safetensors"))
    return len(files), {name: value for file in files for name, value in load_file(file).items()}


def test_the_pipelines_unet_is_pruned_stage_by_stage_as_it_runs_beside_a_text_encoder(miniature, sdprune, tmp_path):
    """The text encoder, which is pruned in the same run, is dense while the U-Net's statistics are gathered."""
    wanted = stage_by_stage(*calibration())
    assert sdprune(*fit("prune", tmp_path / "one", *OPTIONS, "--data.calibration_n=4")).code == 0
    passes, got = stored(tmp_path / "one")
    assert passes == len(STAGES)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name][:, 0].double(), value, rtol=1e-5, atol=1e-8, msg=name)
    two = process(fit("prune", tmp_path / "two", *OPTIONS, "--data.calibration_n=4", "--trainer.devices=2"))
    assert (two.returncode, two.stderr) == (0, "")
    again = stored(tmp_path / "two")[1]
    assert again.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in again.items())
