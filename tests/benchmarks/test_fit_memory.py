"""Peak memory of `sdprune fit` on a Flux with random weights, beside what the same command takes for a tiny one.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_fit_memory.py

takes 0.67 billion parameters in bf16, 1 prompt and 1 step on small latents: ten minutes on two busy cores, 5 GB of
memory. Otherwise the tiny one shows that it runs.
"""

import os
from pathlib import Path

import pytest
from full_size import save_random_flux
from peak_memory import peak
from tiny_families import save

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
WAYS = {
    "Magnitude": "criterion: Magnitude", "Wanda": "criterion: Wanda",
    "Wanda in sequential order": "criterion: Wanda, order: sequential",
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_fit_takes_little_more_than_the_weights(tmp_path):
    tiny = save("Flux", tmp_path / "tiny")
    model = save_random_flux(tmp_path / "flux") if FULL else tiny
    size = sum(file.stat().st_size for file in model.glob("*/*.safetensors")) / 2**30
    config = Path(__file__).parents[2] / "configs" / "mini" / "prune.yaml"

    def fit(which, way):
        return peak([
            "fit", "--config", str(config), "--model.pipeline=Flux", f"--model.pipeline.model={which}",
            f"--model.prune={{transformer: {{sparsity: 0.5, {way}}}}}", "--trainer.precision=bf16-true",
            "--model.sampling={steps: 1, height: 64, width: 64}", "--data.calibration_n=1",
            "--data.calibration_batch_size=1", "--trainer.accelerator=cpu", f"--model.output={tmp_path}/out",
            f"--model.store={tmp_path}/store",
        ])  # fmt: skip

    program = fit(tiny, "criterion: Magnitude")
    print(f"\nprogram {program.own:.2f} GiB ({program.resident:.2f} with files), weights {size:.2f} GiB")
    found = {}
    for name, way in WAYS.items():
        found[name] = fit(model, way)
        own, resident, seconds = found[name]
        more = ", ".join(f"{(one - base) / size:.2f}" for one, base in zip((own, resident), program, strict=False))
        print(f"  {name:26} {own:.2f} GiB ({resident:.2f} with files): {more} x the weights more; {seconds:.0f} s")
    if FULL:
        assert found["Magnitude"].own - program.own < 1.2 * size
        assert found["Wanda"].own - program.own < 1.3 * size
