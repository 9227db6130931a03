"""Narrowing: whole heads, neurons and channels are gone, and what is left computes what it should."""

import json
import shutil
from copy import deepcopy
from itertools import product

import pytest
import torch
import yaml
from command_lines import CONFIGS, fit, predict, process, the_run
from safetensors.torch import load_file, save_file
from torch import nn

import sdprune as package
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec
from sdprune.pruning.criteria.sparsegpt import SparseGPT
from sdprune.pruning.narrowing import NarrowSpec, find_groups

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
    report = package.narrow(small, **{kind: 0.4}, criterion="Magnitude", refit=False)
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
        names = ["mid_block.resnets.0.conv2", "down_blocks.0.resnets.0.conv2"]
        norms = package.gather(dense, calls(dense), PruneSpec(layers=["Conv2d"]), "input_norm")
        package.narrow(small, channels=0.5, criterion=criterion, refit=False, inputs=calls(dense))
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
    package.narrow(small, neurons=0.5, criterion=criterion, damping=1e-7, inputs=batches)
    kept = [i for i, row in enumerate(dense.fc1.weight) if any(torch.equal(row, one) for one in small.fc1.weight)]
    assert len(kept) == 8
    inputs = hidden(dense, batches)
    wanted = inputs @ dense.fc2.weight.double().T + dense.fc2.bias
    explained = torch.cat([inputs[:, kept], torch.ones(len(inputs), 1)], 1)
    solution = torch.linalg.lstsq(explained, wanted).solution.T
    assert torch.allclose(small.fc2.weight.double(), solution[:, :-1], atol=1e-3)
    assert torch.allclose(small.fc2.bias.double(), solution[:, -1], atol=1e-3)


def test_the_refit_sees_what_the_norm_makes_of_the_channels_that_stay():
    """The inputs of the second convolution in the narrowed block, on the dense model's inputs of that block."""
    dense, small, name = small_unet(), small_unet(), "mid_block.resnets.1"
    dense.requires_grad_(False)
    inputs = calls(dense, 60)
    package.narrow(small, channels=0.5, criterion="Magnitude", damping=1e-9, inputs=inputs)
    block, narrowed = dense.get_submodule(name), small.get_submodule(name)
    read, wanted = [], []
    narrowed.conv2.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    block.conv2.register_forward_hook(lambda _, args, output: wanted.append(output))
    block.register_forward_pre_hook(lambda _, args: run(narrowed, args))
    for call in inputs:
        output(dense, call)
    columns = nn.functional.unfold(torch.cat(read), 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    columns = torch.cat([columns, torch.ones(len(columns), 1)], 1)
    outputs = torch.cat(wanted).flatten(2).transpose(1, 2).flatten(0, 1).double()
    solution = torch.linalg.lstsq(columns, outputs).solution.T
    assert torch.allclose(narrowed.conv2.weight.flatten(1).double(), solution[:, :-1], atol=1e-3)
    assert torch.allclose(narrowed.conv2.bias.double(), solution[:, -1], atol=1e-3)
    assert "narrowing" not in dict(small.named_children())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in package_modules(small, narrowed))


def run(module, args):
    module(*args)


def package_modules(component, beside):
    """Modules of a component that the test has put no hooks on."""
    return [one for one in component.modules() if one not in list(beside.modules())]


def test_greedy_removes_what_costs_least(batches):
    """Each removal by brute force: the least-squares error without every unit that is left."""
    dense, small = Reader(), Reader()
    package.narrow(small, neurons=0.5, criterion=SparseGPT(damping=1e-7), inputs=batches)
    inputs = hidden(dense, batches)
    wanted = inputs @ dense.fc2.weight.detach().double().T
    left = list(range(16))

    def error(units):
        fitted = inputs[:, units] @ torch.linalg.lstsq(inputs[:, units], wanted).solution
        return float((fitted - wanted).square().sum())

    while len(left) > 8:
        left.remove(min(left, key=lambda unit: error([one for one in left if one != unit])))
    assert torch.equal(small.fc1.weight, dense.fc1.weight[left])


class Chain(nn.Module):
    """Feed-forward layers one behind another, with a layer that cannot be narrowed."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Reader(4, 7) for _ in range(3))
        self.head = nn.Linear(7, 3)
        torch.manual_seed(2)
        for part, scale in zip(self.parts, (1.0, 0.1, 0.3), strict=True):
            nn.init.normal_(part.fc1.weight, std=0.4)
            nn.init.zeros_(part.fc1.bias)
            nn.init.normal_(part.fc2.weight, std=scale)
            part.fc2.weight.data *= torch.tensor([0.1, 0.5, 2.0, 8.0])

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return self.head(x)


def removal_errors(chain, batches, part):
    """By the number of units that stay: the relative squared change of the outputs of the first 8 samples when one
    part alone keeps so many, removed one by one, each time the one without which a fit on all samples is best."""
    chain = deepcopy(chain).double().requires_grad_(False)
    x = torch.cat(batches).double()
    dense, entering = chain(x)[:8], []
    reader = chain.parts[part].fc2
    reader.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    chain(x)
    inputs, weight, left, found = entering[0], reader.weight.clone(), list(range(4)), {}
    wanted = inputs @ weight.T

    def fit(units):
        return torch.linalg.lstsq(inputs[:, units], wanted).solution

    while len(left) > 1:
        parts = [[one for one in left if one != unit] for unit in left]
        left = min(parts, key=lambda units: (inputs[:, units] @ fit(units) - wanted).square().sum())
        reader.weight.zero_()
        reader.weight[:, left] = fit(left).T
        change = chain(x)[:8] - dense
        found[len(left)] = float((change.square().sum(1) / dense.square().sum(1)).mean())
    return {4: 0.0, **found}


@pytest.mark.parametrize("flops", [0.2, 0.35, 0.5])
def test_measurement_shares_out_what_has_to_go(batches, flops):
    """No other numbers of units that save as much have a smaller sum of errors."""
    dense = Chain()
    errors = [removal_errors(dense, batches, part) for part in range(3)]
    for found in errors:  # each further unit costs more: then the steps of one multiplier are the best numbers
        assert found[3] < found[2] - found[3] < found[1] - found[2]
    small = deepcopy(dense)
    report = package.narrow(
        small, flops=flops, criterion=SparseGPT(damping=1e-9), damping=1e-9, inputs=[one[:8] for one in batches]
    )
    counts = tuple(one.kept for one in report.groups)
    unit, everything = 2 * 7 + 2 * 7, 3 * 4 * (2 * 7 + 2 * 7) + 2 * 7 * 3

    def saved(kept):
        return sum(4 - one for one in kept) * unit / everything

    def error(kept):
        return sum(found[one] for found, one in zip(errors, kept, strict=True))

    assert flops <= saved(counts) < flops + unit / everything
    as_much = [kept for kept in product(range(1, 5), repeat=3) if saved(kept) >= saved(counts)]
    assert error(counts) == pytest.approx(min(map(error, as_much)))
    assert len(set(counts)) > 1
    assert [part.fc1.out_features for part in small.parts] == list(counts)


def test_measurement_where_one_step_can_go(batches):
    """16 neurons go by eights: whatever has to go, one step does, and no more can."""
    for flops in (0.05, 0.5):
        small = Reader()
        assert package.narrow(small, flops=flops, inputs=batches).groups[0].kept == small.fc1.out_features == 8
    with pytest.raises(InputError, match=r"flops is 0.6, and all that can be removed has 0.500 of the"):
        package.narrow(Reader(), flops=0.6, inputs=batches)


def test_flops_are_those_of_heads_neurons_and_channels():
    """What is saved, counted by torch on the dense and on the narrowed module, but for single steps."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    dense, small = small_unet(), small_unet()
    package.narrow(small, flops=0.3, criterion="Magnitude", refit=False, inputs=calls(dense, 2))
    counts = []
    for module in (dense, small):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # as products that are counted
            output(module, calls(module)[0])
        counts.append(counter.get_total_flops())
    assert 0.3 <= 1 - counts[1] / counts[0] < 0.33
    assert {one.kind for one in find_groups(dense)} == set(KINDS)


class Loud(Reader):
    """Whose second layer reads large numbers."""

    def forward(self, x):
        return self.fc2(300 * torch.tanh(self.fc1(x)))


def test_half_precision(batches):
    """Squares of inputs exceed what float16 holds; the same units stay, and the fit is the same."""
    small, whole = Loud(), Loud()
    for module in (small, whole):
        module.requires_grad_(False)
        module.fc1.weight.mul_(0.2)
        module.fc2.weight.copy_(module.fc2.weight.half())
        for layer in (module.fc1, module.fc2):
            layer.weight.copy_(layer.weight.half())
            layer.bias.copy_(layer.bias.half())
    report = package.narrow(small.half(), neurons=0.5, inputs=[one.half() for one in batches])
    package.narrow(whole, neurons=0.5, inputs=[one.half().float() for one in batches])
    assert torch.equal(small.fc1.weight.float(), whole.fc1.weight)
    assert small.fc2.weight.isfinite().all()
    assert torch.allclose(small.fc2.weight.float(), whole.fc2.weight, atol=0.02)
    assert report.parameters == sum(one.numel() for one in small.parameters()) == 8 * 7 + 8 + 5 * 8 + 5


def test_joint_attention_loses_heads_of_both_streams():
    """As in diffusion transformers: queries, keys and values of text and picture, and the outputs of both."""
    from diffusers.models.attention import JointTransformerBlock

    generator = torch.Generator().manual_seed(2)
    text, picture, time = (torch.randn(2, length, 24, generator=generator) for length in (5, 7, 1))
    inputs = [{"hidden_states": picture, "encoder_hidden_states": text, "temb": time[:, 0]}]
    for last in (False, True):  # the last block gives no text
        torch.manual_seed(0)
        dense = JointTransformerBlock(24, 4, 6, context_pre_only=last, qk_norm="rms_norm").eval()
        small = deepcopy(dense)
        report = package.narrow(small, heads=0.5, criterion="Magnitude", refit=False)
        assert [(one.name, one.units, one.kept) for one in report.groups] == [("attn", 4, 2)]
        outs = ["attn.to_out.0"] if last else ["attn.to_out.0", "attn.to_add_out"]
        kept = dense.attn.to_q.weight.unflatten(0, (4, 6))
        kept = [
            one for one in range(4) if any(torch.equal(kept[one], row) for row in small.attn.to_q.weight.view(2, 6, 24))
        ]
        mask = torch.zeros(4, 6)
        mask[kept] = 1
        for name in outs:
            dense.get_submodule(name).register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask.flatten(),))
        with torch.no_grad():
            for one, other in zip(dense(**inputs[0]), small(**inputs[0]), strict=True):
                assert one is other is None or torch.allclose(one, other, atol=1e-5)
        error = {}
        for refit in (False, True):
            again = deepcopy(dense)
            for name in outs:
                again.get_submodule(name)._forward_pre_hooks.clear()
            wanted = again(**inputs[0])
            package.narrow(again, heads=0.5, criterion="Magnitude", refit=refit, inputs=inputs)
            error[refit] = float((again(**inputs[0])[1] - wanted[1]).square().sum().detach())
        assert error[True] < 0.5 * error[False]


def test_modules_are_chosen_by_patterns():
    choice = {"channels": 0.5, "criterion": "Magnitude", "refit": False}
    report = package.narrow(small_unet(), **choice, include=["mid_block*", "up*"], exclude=["*.resnets.0"])
    names = [one.name for one in report.groups]
    assert names == [name for name in names if name.startswith(("mid", "up")) and name.endswith(".1")]
    assert "mid_block.resnets.1" in names
    with pytest.raises(
        InputError, match=r"include pattern 'middle\*' matches none of the 8 modules that can be narrowed"
    ):
        package.narrow(small_unet(), **choice, include=["middle*"])
    with pytest.raises(InputError, match="include is the text 'mid': give a list"):
        package.narrow(small_unet(), **choice, include="mid")


def test_groups_are_found_by_structure():
    for make in (small_unet, small_text_encoder):
        module = make()
        groups = find_groups(module)
        for kind in KINDS:
            assert (kind == "channels" and make is small_text_encoder) != any(one.kind == kind for one in groups)
    with pytest.raises(InputError, match=r"channels is 0.4, and a CLIPTextModel has no channels: it has heads"):
        package.narrow(small_text_encoder(), channels=0.4, criterion="Magnitude", refit=False)


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


@pytest.fixture(scope="module")
def narrowed(miniature, tmp_path_factory):
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("narrowed")
    words = ["--model.prune={}", ALL, "--model.narrow.unet.criterion=Magnitude", "--model.narrow.unet.refit=false"]
    words += ["--model.narrow.text_encoder.criterion=Magnitude", "--model.narrow.text_encoder.refit=false"]
    assert main(fit("prune", output, *words, f"--model.directory={output / 'saved'}")) == 0
    return output / "saved"


def test_it_is_a_plain_pipeline_when_sdprune_loads_it(narrowed, tmp_path):
    """Bit by bit the weights of the file, of the classes that diffusers and transformers have, and it saves itself."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = package.load(narrowed)
    assert type(pipe) is StableDiffusionPipeline
    assert (type(pipe.unet), type(pipe.text_encoder)) == (UNet2DConditionModel, CLIPTextModel)
    for name in ("unet", "text_encoder"):
        (file,) = (narrowed / name).glob("*.safetensors")
        stored, loaded = load_file(file), getattr(pipe, name).state_dict()
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(loaded[key], value) for key, value in stored.items())
    card = (narrowed / "README.md").read_text()
    assert "sdprune.load(" in card
    assert "from_pretrained" not in card
    assert "- `unet`, narrowed: 36 of 58 heads" in card  # 2 of 3 in six attentions, 3 of 5 in eight
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red star", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    pipe.save_pretrained(tmp_path / "again")
    again = package.load(tmp_path / "again", torch.float16)
    assert torch.equal(again.unet.mid_block.resnets[0].conv2.weight, pipe.unet.mid_block.resnets[0].conv2.weight.half())
    with pytest.raises(RuntimeError, match="size mismatch"):  # and never by other means, with weights at random
        UNet2DConditionModel.from_pretrained(narrowed / "unet")


def test_a_text_encoder_whose_file_has_older_names(narrowed, tmp_path):
    shutil.copytree(narrowed, tmp_path / "old")
    (file,) = (tmp_path / "old" / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    save_file({f"text_model.{name}": value for name, value in weights.items()}, file, {"format": "pt"})
    loaded = package.load(tmp_path / "old").text_encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


RESNET, ATTENTION = "mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("tensor", "shape", "line"),
    [
        (f"{RESNET}.conv1.weight", (95, 160, 3, 3), "has 95 rows, and a model narrowed from this configuration"),
        (f"{RESNET}.conv1.weight", (176, 160, 3, 3), "a multiple of 16, at most 160"),
        (f"{RESNET}.conv2.weight", (160, 80, 3, 3), "has shape [160, 80, 3, 3], and a model narrowed like this"),
        (f"{RESNET}.norm2.bias", (1,), "has shape [1], and a model narrowed like this one has [96]"),
        (f"{ATTENTION}.to_q.weight", (65, 160), "has 65 rows"),
        (f"{ATTENTION}.to_q.weight", (0, 160), "a multiple of 32, at most 160"),
        (f"{ATTENTION}.to_v.weight", (64, 160), "has shape [64, 160], and a model narrowed like this one has [96, "),
        ("conv_in.weight", (96, 8, 1, 1), "has shape [96, 8, 1, 1]"),
    ],
)  # fmt: skip
def test_a_shape_that_narrowing_cannot_make_is_refused_by_name(sdprune, narrowed, tmp_path, tensor, shape, line):
    shutil.copytree(narrowed, tmp_path / "bad")
    (file,) = (tmp_path / "bad" / "unet").glob("*.safetensors")
    save_file(load_file(file) | {tensor: torch.zeros(shape)}, file, {"format": "pt"})
    with pytest.raises(InputError) as raised:
        package.load(tmp_path / "bad")
    assert f"{tmp_path / 'bad' / 'unet'} is damaged: {tensor} " in str(raised.value)
    assert line in str(raised.value)
    told = sdprune(*predict(tmp_path, "--model.prune={}", f"--model.pipeline.model={tmp_path / 'bad'}"))
    assert (told.code, told.err.count("\n"), tensor in told.err) == (2, 1, True)


def test_what_is_left_is_pruned(sdprune, miniature, tmp_path):
    """Sparsities are shares of the narrowed layers, whose inputs are those of the narrowed model."""
    where = ["--model.narrow={unet: {heads: 0.4, channels: 0.4}}", "--model.prune={unet: {sparsity: 0.5}}"]
    where += ["--model.prune.unet.criterion=Wanda", f"--model.directory={tmp_path / 'saved'}"]
    told = sdprune(*fit("prune", tmp_path, *where))
    assert (told.code, told.err) == (0, "")
    report = json.loads((tmp_path / "saved" / "pruning_report.json").read_text())
    (file,) = (tmp_path / "saved" / "unet").glob("*.safetensors")
    weights = load_file(file)
    for layer in report["layers"]["unet"]:
        weight = weights[f"{layer['name']}.weight"]
        assert layer["weights"] == weight.numel()
        assert (
            layer["zeros"] == int((weight == 0).sum()) >= layer["pruned"] == weight.shape[0] * int(weight.shape[1] / 2)
        )
    found = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "statistics").glob("unet-*"))
    assert found == ["unet-hessian", "unet-hessian", "unet-input_norm"]  # choice, refit, and the narrowed model
    told = sdprune(*fit("prune", tmp_path, *where[1:3]))  # those of the dense model are others
    assert told.code == 0
    assert len(list((tmp_path / "statistics").glob("unet-input_norm-*"))) == 2


@pytest.fixture(scope="module")
def measured(miniature, tmp_path_factory):
    """A narrowing by measurement, drawn by one process."""
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("measured")
    assert main(predict(output, *MEASURED)) == 0
    return output


MEASURED = ["--model.prune={}", "--model.narrow.unet.flops=0.08", "--model.compare_dense=false"]
MEASURED += ["--model.narrow.unet.include=['mid_block*']", "--model.narrow.unet.criterion=Wanda"]


def test_measurement_by_the_command_line(sdprune, measured):
    """The name and the record say what it is; another share gathers nothing but the fit anew."""
    record = the_run(measured, "unet-narrow-flops0.08-wanda")
    found = json.loads((record / "results.json").read_text())["narrowing"]["unet"]
    assert found["kinds"].keys() == set(KINDS)
    assert found["spec"]["flops"] == 0.08
    stored = {path.name.rpartition("-")[0] for path in (measured / "statistics").glob("unet-*")}
    assert stored == {"unet-hessian", "unet-input_norm", "unet-removal_error"}
    told = sdprune(*predict(measured, *MEASURED, "--model.narrow.unet.flops=0.04", "--model.prune.unet.sparsity=0.5"))
    assert (told.code, told.err) == (0, "")
    assert len(list((measured / "statistics").glob("unet-removal_error-*"))) == 1
    other = json.loads((the_run(measured, "unet-narrow-flops0.04") / "results.json").read_text())
    assert other["narrowing"]["unet"]["parameters"] > found["parameters"]
    told = sdprune(*predict(measured, *MEASURED, "--model.narrow.unet.flops=0.9"))
    assert told.code == 2
    assert "--model.narrow.unet.flops is 0.9, and all that can be removed" in told.err


def test_two_processes_make_the_same_narrowed_model(measured, tmp_path):
    done = process(predict(tmp_path, *MEASURED, "--trainer.devices=2", "--trainer.strategy=ddp"))
    assert (done.returncode, done.stderr) == (0, "")
    one, two = (the_run(output, "unet-narrow-flops0.08") for output in (measured, tmp_path))
    hashes = [json.loads((record / "results.json").read_text())["narrowing"]["unet"]["hash"] for record in (one, two)]
    assert hashes[0] == hashes[1]
    assert pictures(one) == pictures(two)


def test_another_narrowing_is_another_run(sdprune, miniature, tmp_path):
    plain = [
        "--model.narrow.unet.criterion=Magnitude",
        "--model.narrow.unet.refit=false",
        "--model.compare_dense=false",
    ]
    names = set()
    for share in ("channels=0.4", "channels=0.3", "neurons=0.4"):
        command = predict(tmp_path, "--model.prune={}", f"--model.narrow.unet.{share}", *plain)
        assert sdprune(*command).code == 0
        names = {path.name for path in tmp_path.iterdir() if (path / "results.json").exists()}
    assert len(names) == 3
    assert {name.rpartition("-")[0] for name in names} == {
        f"unet-narrow-{one}-magnitude-plain" for one in ("channels0.4", "channels0.3", "neurons0.4")
    }
    told = sdprune(*command)
    assert "This run was finished already" in told.out
    assert sdprune("report", tmp_path, "--out", tmp_path / "report").code == 0
    rows = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "| unet-narrow" in line]
    assert len(rows) == 3
    assert all(line.split("|")[2].strip() == "dense" for line in rows)
    assert sum("narrowed, unet narrow channels 0.4" in line.split("|")[3] for line in rows) == 1
    assert not any("dense" in line.split("|")[3] for line in rows)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model.narrow.unet.channels=1.5"], "--model.narrow.unet.channels is 1.5: give a share between 0 and 1"),
        (["--model.narrow.unet.chanels=0.5"], "Did you mean 'model.narrow.unet.channels'?"),
        (["--model.narrow.nuet.channels=0.5"], "Unknown component 'nuet'. Did you mean 'unet'?"),
        (
            ["--model.narrow.text_encoder.channels=0.5"],
            "--model.narrow.text_encoder.channels is 0.5, and a CLIPTextModel has no channels: it has heads, neurons.",
        ),
        (["--model.narrow.unet.damping=0"], "--model.narrow.unet.damping is 0"),
        (["--model.narrow.unet.flops=-1"], "--model.narrow.unet.flops is -1"),
        (
            ["--model.narrow.unet={flops: 0.2, heads: 0.4}"],
            "--model.narrow.unet.flops is 0.2, which decides the shares of all kinds, and heads is 0.4: give one.",
        ),
        (
            ["--model.narrow.unet.flops=0.2", "--model.budget.total=0.3", "--model.prune={}"],
            "--model.narrow.unet.flops leaves the number of weights to measurement",
        ),
    ],
)
def test_what_cannot_be_narrowed_is_explained(sdprune, miniature, tmp_path, options, line):
    told = sdprune(*predict(tmp_path, *options))
    assert told.code == 2
    assert line in told.err
    assert told.err.count("\n") == 1


def test_options_need_no_entry_in_the_configuration(sdprune, miniature, tmp_path):
    """A configuration of one's own that does not mention narrowing takes its options too."""
    config = yaml.safe_load((CONFIGS / "predict.yaml").read_text())
    del config["model"]["init_args"]["narrow"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    told = sdprune(
        "predict", f"--config={tmp_path / 'own.yaml'}", "--model.narrow.unet.heads=0.2",
        "--model.narrow.unet.neurons=0.3", "--print_config",
    )  # fmt: skip
    assert (told.code, told.err) == (0, "")
    assert yaml.safe_load(told.out)["model"]["init_args"]["narrow"]["unet"]["neurons"] == 0.3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"neuron": 0.5}, "Unknown option 'neuron'. Did you mean 'neurons'"),
        ({"spec": NarrowSpec(neurons=0.5), "heads": 0.5}, "Give a spec or the options heads, not both"),
        ({"spec": "neurons"}, "give a NarrowSpec, or its fields by name, as in neurons=0.3"),
        ({}, "Nothing is to be removed"),
    ],
)
def test_what_is_given_in_python_is_checked(given, words):
    with pytest.raises(InputError, match=words):
        package.narrow(torch.nn.Linear(2, 2), **given)
