"""Which heads, neurons and channels stay, and what the layers that read them become."""

from copy import deepcopy

import pytest
import torch
from narrowing import Reader, calls, hidden, output, random_batches, small_text_encoder, small_unet
from torch import nn

import sdprune as package
from sdprune.errors import InputError
from sdprune.pruning import PruneSpec
from sdprune.pruning.criteria.sparsegpt import SparseGPT
from sdprune.pruning.narrowing import NarrowSpec, find_groups

KINDS = ("heads", "neurons", "channels")


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


@pytest.fixture
def batches():
    return random_batches()


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
