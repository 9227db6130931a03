"""Narrowing: whole heads, neurons and channels are gone, and what is left computes what it should."""

import json

import pytest
import torch
from command_lines import fit, predict, the_run
from safetensors.torch import load_file
from torch import nn

import sdprune as package
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec
from sdprune.pruning.narrowing import NarrowSpec, find_groups, narrow

KINDS = ("heads", "neurons", "channels")
ALL = "--model.narrow={unet: {heads: 0.4, neurons: 0.4, channels: 0.4}, text_encoder: {heads: 0.4, neurons: 0.3}}"


def small_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(4, 4), cross_attention_dim=12, norm_num_groups=4,
    ).eval()  # fmt: skip


def small_text_encoder(**options):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        max_position_embeddings=9, **options,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def calls(module, number=3):
    generator = torch.Generator().manual_seed(1)
    if "CLIP" in type(module).__name__:
        return [{"input_ids": torch.randint(0, 50, (4, 9), generator=generator)} for _ in range(number)]
    return [
        {
            "sample": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor(100 * (one + 1)),
            "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        }
        for one in range(number)
    ]  # fmt: skip


@torch.no_grad()
def output(module, call):
    return module(**call)[0]


def normed(norm, x, kept):
    """A group norm over some channels, in float64: each group of channels by its own mean and variance."""
    out, size = torch.zeros_like(x), x.shape[1] // norm.num_groups
    for item in range(len(x)):
        for group in range(norm.num_groups):
            channels = [one for one in kept if one // size == group]
            values = x[item, channels].double()
            scaled = (values - values.mean()) / (values.var(correction=0) + norm.eps).sqrt()
            for channel, value in zip(channels, scaled, strict=True):
                out[item, channel] = value * norm.weight[channel] + norm.bias[channel]
    return out


MODULES = [
    (small_unet, "heads"), (small_unet, "neurons"), (small_unet, "channels"),
    (small_text_encoder, "heads"), (small_text_encoder, "neurons"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind"), MODULES)
def test_without_refit_it_is_the_module_with_the_units_silenced(make, kind):
    """Silenced by hooks on what the consuming layers read, found by names that are written down here. A norm before
    that sees the channels that stay alone."""
    dense, small = make(), make()
    report = narrow(small, NarrowSpec(**{kind: 0.4}, criterion="Magnitude", refit=False))
    readers = {"heads": ("to_out.0", "out_proj"), "neurons": ("ff.net.2", "fc2"), "channels": ("conv2",)}[kind]
    layers = {name: one for name, one in dense.named_modules() if name.endswith(readers)}
    assert len(layers) == len(report.groups) > 0
    for name, layer in layers.items():
        kept_weight = small.get_submodule(name).weight
        wide = layer.weight.shape[1]
        width = wide // next(one.units for one in report.groups if name.startswith(f"{one.name}."))
        # The columns of the narrowed layer are those of the dense one, in their order.
        kept, place = [], 0
        for unit in range(wide // width):
            columns = slice(unit * width, (unit + 1) * width)
            if place < kept_weight.shape[1] and torch.equal(
                layer.weight[:, columns], kept_weight[:, place : place + width]
            ):
                kept.append(unit)
                place += width
        assert place == kept_weight.shape[1] < wide
        mask = torch.zeros(wide)
        for unit in kept:
            mask[unit * width : (unit + 1) * width] = 1
        if kind == "channels":
            norm = dense.get_submodule(name.replace("conv2", "norm2"))
            norm.register_forward_hook(lambda norm, args, _, kept=kept: normed(norm, args[0], kept))
        mask = mask.view((1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,))
        layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:]))
    for call in calls(dense):
        assert torch.allclose(output(small, call), output(dense, call), atol=2e-5)
    parameters = sum(one.numel() for one in small.parameters())
    assert (report.parameters_before, report.parameters) == (sum(p.numel() for p in dense.parameters()), parameters)


def test_what_stays_by_nested_loops():
    """Magnitude and Wanda: the sum of squared scores over all weights that read a unit; equally many in each group."""
    for criterion in ("Magnitude", "Wanda"):
        dense, small = small_unet(), small_unet()
        spec = NarrowSpec(channels=0.5, criterion=criterion, refit=False)
        names = ["mid_block.resnets.0.conv2", "down_blocks.0.resnets.0.conv2"]
        norms = package.gather(dense, calls(dense), PruneSpec(layers=["Conv2d"]), "input_norm")
        narrow(small, spec, norms)
        for name in names:
            weight, squared = dense.get_submodule(name).weight, norms["input_norm"][name]
            scores = []
            for channel in range(weight.shape[1]):
                score = 0.0
                for row in range(weight.shape[0]):
                    for y in range(3):
                        for x in range(3):
                            factor = squared.mean(0)[0, channel * 9 + y * 3 + x] if criterion == "Wanda" else 1.0
                            score += float(weight[row, channel, y, x].detach()) ** 2 * float(factor)
                scores.append(score)
            run = len(scores) // 4
            kept = [
                channel
                for part in range(4)
                for channel in sorted(sorted(range(part * run, part * run + run), key=lambda c: scores[c])[run // 2 :])
            ]
            assert torch.equal(small.get_submodule(name).weight, weight[:, kept])


class Reader(nn.Module):
    """A feed-forward layer whose inputs are known."""

    def __init__(self, units=16, rows=5):
        super().__init__()
        torch.manual_seed(3)
        self.fc1, self.fc2 = nn.Linear(7, units), nn.Linear(units, rows)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def hidden(module, batches):
    with torch.no_grad():
        return torch.tanh(module.fc1(torch.cat(batches))).double()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(40, 7, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("criterion", ["Magnitude", "Wanda", "SparseGPT"])
def test_the_refit_is_least_squares_on_the_inputs(batches, criterion):
    dense, small = Reader(), Reader()
    spec = NarrowSpec(neurons=0.5, criterion=criterion, damping=1e-7)
    statistics = package.gather(dense, batches, PruneSpec(), spec.statistics)
    narrow(small, spec, statistics)
    kept = [i for i, row in enumerate(dense.fc1.weight) if any(torch.equal(row, one) for one in small.fc1.weight)]
    assert len(kept) == 8
    inputs = hidden(dense, batches)
    wanted = inputs @ dense.fc2.weight.double().T
    solution = torch.linalg.lstsq(inputs[:, kept], wanted).solution.T
    assert torch.allclose(small.fc2.weight.double(), solution, atol=1e-3)
    assert torch.equal(small.fc2.bias, dense.fc2.bias)


def test_greedy_removes_what_costs_least(batches):
    """Each removal by brute force: the least-squares error without every unit that is left."""
    dense, small = Reader(), Reader()
    from sdprune.pruning.criteria.sparsegpt import SparseGPT

    spec = NarrowSpec(neurons=0.5, criterion=SparseGPT(damping=1e-7), damping=1e-7)
    narrow(small, spec, package.gather(dense, batches, PruneSpec(), spec.statistics))
    inputs = hidden(dense, batches)
    wanted = inputs @ dense.fc2.weight.detach().double().T
    left = list(range(16))

    def error(units):
        fitted = inputs[:, units] @ torch.linalg.lstsq(inputs[:, units], wanted).solution
        return float((fitted - wanted).square().sum())

    while len(left) > 8:
        left.remove(min(left, key=lambda unit: error([one for one in left if one != unit])))
    assert torch.equal(small.fc1.weight, dense.fc1.weight[left])


def test_groups_are_found_by_structure():
    for make in (small_unet, small_text_encoder):
        module = make()
        groups = find_groups(module)
        for kind in KINDS:
            assert (kind == "channels" and make is small_text_encoder) != any(one.kind == kind for one in groups)
    with pytest.raises(InputError, match=r"channels is 0.4, and a CLIPTextModel has no channels: it has heads"):
        narrow(small_text_encoder(), NarrowSpec(channels=0.4))


# --- by the command line ---------------------------------------------------------------------------------------


def pictures(directory):
    return {path.name: path.read_bytes() for path in directory.glob("images/*.png")}


def test_predict_and_fit_make_the_same_model(sdprune, miniature, tmp_path):
    """Narrowed in memory, and saved and loaded: the same pictures; the record says what it has become."""
    where = ["--model.prune={}", ALL]
    told = sdprune(*predict(tmp_path / "memory", *where))
    assert (told.code, told.err) == (0, "")
    assert "unet is narrowed: " in told.out
    saved = tmp_path / "saved"
    told = sdprune(*fit("prune", tmp_path, *where, f"--model.directory={saved}", "--data.source.split=train"))
    assert (told.code, told.err) == (0, "")
    report = json.loads((saved / "pruning_report.json").read_text())["narrowing"]
    for name, found in report.items():
        (file,) = (saved / name).glob("*.safetensors")
        assert found["parameters"] == sum(one.numel() for one in load_file(file).values())
        assert found["parameters"] < found["parameters_before"]
    record = the_run(tmp_path / "memory", "text_encoder-narrow-heads0.4-neurons0.3-sparsegpt-unet-narrow-heads0.4")
    results = json.loads((record / "results.json").read_text())
    assert results["sparsity"]["components"]["unet"]["parameters"] == report["unet"]["parameters"]
    again = ["--model.prune={}", f"--model.pipeline.model={saved}", "--model.baseline=miniature"]
    told = sdprune(*predict(tmp_path / "again", *again))
    assert (told.code, told.err) == (0, "")
    assert pictures(the_run(tmp_path / "again", "saved")) == pictures(record)
    assert len(pictures(record)) == 7
