"""Inner channels of the residual blocks of a U-Net."""

from __future__ import annotations

from typing import Optional

from torch import nn

from sdprune.pruning.narrowing.groups.base import Group, Grouping, Slice


class ResnetChannels(Grouping):
    """Channels between the two convolutions of a residual block.

    They are rows of the first convolution and of the time projection, places of the second norm, and channels that the
    second convolution reads. Equally many stay in each group of the norm, so that their number of groups is as before.
    """

    kind = "channels"

    def find(self, name: str, module: nn.Module) -> Optional[Group]:  # noqa: D102
        first, norm, second = (getattr(module, one, None) for one in ("conv1", "norm2", "conv2"))
        if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Conv2d) or not isinstance(norm, nn.GroupNorm):
            return None
        units, time = second.in_channels, getattr(module, "time_emb_proj", None)
        if first.out_channels != units or norm.num_channels != units or {first.groups, second.groups} != {1}:
            return None
        made = [Slice("conv1"), Slice("norm2")]
        if time is not None:
            if not isinstance(time, nn.Linear) or time.out_features not in (units, 2 * units):
                return None
            made += [Slice("time_emb_proj", offset) for offset in range(0, time.out_features, units)]
        return Group("channels", name, module, units, tuple(made), (Slice("conv2"),), parts=norm.num_groups)
