"""Peak memory of SparseGPT on Stable Diffusion 2's U-Net beside that of magnitude pruning, within a budget of Hessians.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_hessian_memory.py

runs `sdprune fit` on the full-size U-Net with random weights, 2 prompts and 2 steps on small latents: ten minutes on
two cores, 12 GB of memory. Otherwise the miniature shows that it runs.
"""

import os
from pathlib import Path

import pytest
from full_size import save_full_size
from peak_memory import peak

from sdprune.mini.models import save_random

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
BUDGET = 1.0 if FULL else 0.01  # GiB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_sparsegpt_on_the_unet_stays_inside_its_budget(tmp_path, monkeypatch):
    # glibc keeps freed blocks below this size for reuse; the budget is about what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    model = tmp_path / "model"
    if FULL:
        save_full_size(model)
    else:
        save_random(tmp_path)
        model = tmp_path / "pipeline"
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    config = Path(__file__).parents[2] / "configs" / "mini" / "prune.yaml"
    common = [
        "fit", "--config", str(config), f"--model.pipeline.model={model}", "--model.prune.text_encoder.sparsity=0",
        "--model.prune.unet.sparsity=0.5", "--data.source=TextFile", f"--data.source.path={tmp_path}/prompts.txt",
        "--data.calibration_n=2", "--data.calibration_batch_size=2", "--model.sampling.steps=2",
        "--model.sampling.height=128", "--model.sampling.width=128", "--trainer.accelerator=cpu",
        f"--model.output={tmp_path}/out", f"--model.store={tmp_path}/store",
    ]  # fmt: skip
    _, wanda, wanda_seconds = peak([*common, "--model.prune.unet.criterion=Wanda"])
    options = ["--model.prune.unet.criterion=SparseGPT", f"--model.calibration.hessian_gib={BUDGET}"]
    _, sparsegpt, seconds = peak([*common, *options])
    files = list((tmp_path / "store").glob("unet-hessian-*/*.safetensors"))
    hessians = sum(file.stat().st_size for file in files) / 2**30
    print(
        f"\nWanda {wanda:.2f} GiB in {wanda_seconds:.0f} s; SparseGPT {sparsegpt:.2f} GiB in {seconds:.0f} s, with "
        f"{hessians:.2f} GiB of Hessians gathered in {len(files)} passes within {BUDGET} GiB"
    )
    assert len(files) > 1
    if FULL:
        assert sparsegpt - wanda <= BUDGET
