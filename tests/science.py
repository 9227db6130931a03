"""Numbers that no change of structure may move, to the bit: recorded in science.json, compared by test_science.py.

python tests/science.py    records them anew; do so only where CHANGELOG says why they moved
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

DATA = Path(__file__).with_name("science.json")
WEIGHTS = Path(__file__).parents[1] / "sdprune" / "mini" / "weights" / "pipeline"
CRITERIA = ("Magnitude", "Wanda", "SparseGPT")
ALLOCATIONS = ("Uniform", "OWL", "GlobalRanking")
GRANULARITIES = ("layer", "row", "column_block", "module_block", "component", "2:4")
COMPONENTS = ("text_encoder", "unet")
RUNS = {
    "magnitude": ["--model.prune.text_encoder.sparsity=0.475", "--model.prune.unet.sparsity=0.35"],
    "wanda_owl": [
        "--model.prune.text_encoder={sparsity: 0.5, criterion: Wanda, allocation: OWL}",
        "--model.prune.unet={sparsity: 0.4, criterion: Wanda, allocation: OWL, timesteps: log_decrease}",
    ],
    "sequential": [
        "--model.prune.text_encoder={sparsity: 0.5, criterion: SparseGPT, order: sequential}",
        "--model.prune.unet={sparsity: 0.4, criterion: Wanda, order: sequential}",
    ],
    "sparsegpt_conv": [
        "--model.prune.text_encoder.sparsity=0",
        "--model.prune.unet={sparsity: 0.4, criterion: SparseGPT, layers: [Linear, Conv2d]}",
    ],
}


def machine() -> str:
    """A digest of how this machine rounds: numbers are equal to the bit only where it is the same."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(192, 192, generator=generator)
    square = a @ a.T + 192 * torch.eye(192)
    image = torch.randn(2, 16, 24, 24, generator=generator)
    kernel = torch.randn(32, 16, 3, 3, generator=generator)
    values = [
        torch.linalg.cholesky(square), torch.nn.functional.conv2d(image, kernel), a.softmax(1), a.double() @ a.double(),
        torch.nn.functional.scaled_dot_product_attention(image, image, image),
    ]  # fmt: skip
    return _digest(values)


def _digest(values: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def component(name: str) -> torch.nn.Module:
    """A part of the miniature, as diffusers and transformers load it."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    cls = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel}[name]
    return cls.from_pretrained(WEIGHTS / name).eval()


def inputs(name: str, module: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Three calls of four items each."""
    generator = torch.Generator().manual_seed(1)
    config = module.config
    if name == "text_encoder":
        length = config.max_position_embeddings
        return [{"input_ids": torch.randint(config.vocab_size, (4, length), generator=generator)} for _ in range(3)]
    size = config.sample_size
    return [
        {
            "sample": torch.randn(4, config.in_channels, size, size, generator=generator),
            "timestep": torch.tensor(time),
            "encoder_hidden_states": torch.randn(4, 16, config.cross_attention_dim, generator=generator),
        }
        for time in (900, 500, 100)
    ]


def masks() -> Iterator[tuple[str, str]]:
    """(choices, hash of the masks) for all that can be combined."""
    from sdprune import PruneSpec, gather, prune
    from sdprune.errors import InputError

    for name in COMPONENTS:
        module = component(name)
        dense = {key: value.clone() for key, value in module.state_dict().items()}
        calls = inputs(name, module)
        statistics = gather(module, calls, PruneSpec(sparsity=0.5), ["hessian", "input_norm"])
        for key in ("hessian", "input_norm"):
            yield f"{name} {key}", _digest([statistics[key][layer] for layer in sorted(statistics[key])])
        for choices in product(CRITERIA, ALLOCATIONS, GRANULARITIES, ("exact", "original")):
            criterion, allocation, granularity, mode = choices
            try:
                options = {"criterion": criterion, "allocation": allocation, "granularity": granularity, "mode": mode}
                spec = PruneSpec(sparsity=None if granularity == "2:4" else 0.45, **options)
                report = prune(module, spec, statistics)
            except InputError:
                continue
            finally:
                changed = _digest(
                    [value for key, value in sorted(module.state_dict().items()) if key.endswith("weight")]
                )
                module.load_state_dict(dense)
            yield f"{name} {' '.join(choices)}", f"{report.mask_hash[:16]} {changed}"


def pictures() -> Iterator[tuple[str, dict[str, object]]]:
    """(name of a run, its masks, pictures and scores), by the command line."""
    from PIL import Image

    from sdprune.__main__ import main

    config = Path(__file__).parents[1] / "configs" / "mini" / "predict.yaml"
    with tempfile.TemporaryDirectory() as folder:
        small = ["--data.n=6", "--data.batch_size=3", "--data.source.images=40", "--data.calibration.images=20"]
        small += ["--data.calibration_n=5", "--data.calibration_batch_size=2", "--model.sampling.steps=3"]
        small += ["--model.samples=[a red star]", "--trainer.accelerator=cpu"]
        where = [f"--model.output={folder}", f"--model.store={folder}/statistics"]
        for name, options in RUNS.items():
            before = set(Path(folder).glob("*/results.json"))
            with contextlib.redirect_stdout(io.StringIO()):
                assert main(["predict", "--config", str(config), *small, *where, *options]) == 0
            for path in sorted(set(Path(folder).glob("*/results.json")) - before):
                results = json.loads(path.read_text())
                drawn = [
                    torch.tensor(list(Image.open(one).tobytes())) for one in sorted(path.parent.glob("images/*.png"))
                ]
                yield (
                    f"{name} {'pruned' if results['pruning'] else 'dense'}",
                    {
                        "masks": {key: one["mask_hash"][:16] for key, one in results["pruning"].items()},
                        "zeros": results["sparsity"]["pipeline"]["zeros"],
                        "pictures": _digest(drawn),
                        "metrics": results["metrics"],
                        "comparison": {key: one for key, one in results["comparison"].items() if key != "dense"},
                    },
                )


def record() -> dict[str, object]:
    """All of it."""
    torch.set_num_threads(1)
    return {"machine": machine(), "masks": dict(masks()), "pictures": dict(pictures())}


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ.pop("SDPRUNE_MINIATURE", None)
    DATA.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
    sys.exit(0)
