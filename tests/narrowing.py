"""Small modules that tests of narrowing share."""

import torch
from torch import nn

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
    config = CLIPTextConfig(**{
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 50, "max_position_embeddings": 9, **options,
    })  # fmt: skip
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


def random_batches():
    """Inputs of a `Reader`."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(40, 7, generator=generator) for _ in range(3)]


def pictures(directory):
    """Of a record, by name."""
    return {path.name: path.read_bytes() for path in directory.glob("images/*.png")}
