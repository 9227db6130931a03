"""Which denoising step a call of the U-Net counts in, with schedulers that call it more often than once a step."""

import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from command_lines import fit
from safetensors.torch import load_file

from sdprune.pipelines import Sampling, StableDiffusion
from sdprune.pipelines.sampling import image_seed

STEPS = 4
SCHEDULERS = {  # calls of 4 steps
    "DDIMScheduler": 4,
    "HeunDiscreteScheduler": 7,
    "PNDMScheduler": 13,
    "KDPM2DiscreteScheduler": 7,
    "EulerDiscreteScheduler": 4,
}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def captions():
    from sdprune.mini.source import EmbeddedWorld

    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    return list(source.load()["caption"])[:2], [image_seed(0, f"calibration:{i}") for i in range(2)]


def calls_by_hand(scheduler):
    """(timestep, sum of squares [columns] over the 2 images) of every call, by two plain hooks."""
    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    unet, found = model.components["unet"], []
    where = list(inspect.signature(type(unet).forward).parameters).index("timestep") - 1

    def start(module, args, kwargs):
        found.append([float(kwargs["timestep"] if "timestep" in kwargs else args[where]), None])

    def see(module, args):
        found[-1][1] = args[0].double().square().flatten(0, -2).sum(0)

    handles = [unet.register_forward_pre_hook(start, with_kwargs=True)]
    handles.append(unet.get_submodule(LAYER).register_forward_pre_hook(see))
    model.generate(*captions(), Sampling(steps=STEPS, guidance=2.5, scheduler=scheduler), decode=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_call_counts_in_its_step_and_a_steps_calls_are_averaged(scheduler, miniature, sdprune, tmp_path):
    assert hasattr(diffusers, scheduler)
    calls = calls_by_hand(scheduler)
    assert len(calls) == SCHEDULERS[scheduler]
    timesteps = sorted({timestep for timestep, _ in calls}, reverse=True)
    steps: list[list[torch.Tensor]] = [[] for _ in range(STEPS)]
    for timestep, squares in calls:  # a share of the distinct timesteps each, in order
        steps[timesteps.index(timestep) * STEPS // len(timesteps)].append(squares)
    assert all(steps)
    wanted = torch.stack([sum(step) / len(step) for step in steps]) / 2
    options = [f"--model.sampling.scheduler={scheduler}", f"--model.sampling.steps={STEPS}"]
    options += ["--data.calibration_n=2", "--model.components=[unet]"]
    assert sdprune(*fit("calibrate", tmp_path, *options)).code == 0
    (file,) = Path(tmp_path, "statistics").glob("unet-input_norm-*/*.safetensors")
    got = load_file(file)[LAYER]
    torch.testing.assert_close(got[:, 0].double(), wanted, rtol=1e-4, atol=1e-6)
