"""How much each denoising step counts."""

import math
from typing import Literal, get_args

from sdprune.errors import unknown

Timesteps = Literal["uniform", "linear", "log_decrease", "log_increase"]


def timestep_weights(name: Timesteps, steps: int) -> list[float]:
    """How much each denoising step counts, first (noisiest) to last.

    `log_decrease` is 0.8 + 0.4 * ln(T - i) / ln(T) at step i of T (OBS-Diff, 2025); `log_increase` is that read
    backwards, `linear` falls from 1.2 to 0.8 evenly, `uniform` is 1 throughout.

    Raises:
        InputError: for an unknown name.
    """
    if name not in get_args(Timesteps):
        raise unknown("timestep weighting", name, get_args(Timesteps))
    if name == "uniform" or steps == 1:
        return [1.0] * steps
    if name == "linear":
        return [1.2 - 0.4 * i / (steps - 1) for i in range(steps)]
    falling = [0.8 + 0.4 * math.log(steps - i) / math.log(steps) for i in range(steps)]
    return falling if name == "log_decrease" else falling[::-1]
