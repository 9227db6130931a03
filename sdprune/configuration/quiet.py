"""Keeps warnings out of sight that are not for the user. Call `quiet` before Lightning and diffusers are imported."""

from __future__ import annotations

import os
import warnings


def quiet() -> None:
    """Set the filters."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for message in (  # Lightning's talk with its own developers, and advice on training loops
        "LightningCLI's args parameter is intended",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "`LightningModule.configure_optimizers` returned `None`",
        r"The number of training batches \(",
        r"The '\w+' does not have many workers",
        "`torch_dtype` is deprecated",
        "The `local_dir_use_symlinks` argument is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", module=r"jsonargparse\b|lightning\.pytorch\.cli")
