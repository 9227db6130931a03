"""Draw docs/miniature.png from the records under runs/: the same prompts and noise at rising magnitude sparsity.

run="sdprune predict --config configs/mini/predict.yaml --model.prune"
for s in 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9; do
    $run.text_encoder.sparsity=0 --model.prune.unet.sparsity=$s
    $run.text_encoder.sparsity=$s --model.prune.unet.sparsity=0
done
python docs/picture.py
"""

from pathlib import Path

from sdprune.pictures import grid
from sdprune.record import read_json, read_png, save_png

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
ROOT = Path(__file__).parent.parent


def samples(pattern: str) -> list:
    """The sample pictures of the newest record whose directory matches."""
    found = sorted((ROOT / "runs").glob(f"{pattern}/results.json"), key=lambda path: path.stat().st_mtime)
    return [read_png(path) for path in sorted((found[-1].parent / "samples").glob("*.png"))]


def main() -> None:
    """Write the picture: a row for each component, a column for each sparsity, one prompt after the other."""
    dense = next((ROOT / "runs").glob("dense-*"))
    prompts = read_json(dense / "config.json")["samples"]
    rows, number = {}, 0
    for component in ("text_encoder", "unet"):
        columns = [samples("dense-*"), *(samples(f"{component}-magnitude-{s:g}-*") for s in SPARSITIES)]
        for number in (0, 3):
            rows[f"{component.replace('_', ' ')}\n{prompts[number]}"] = [column[number] for column in columns]
    captions = ["dense", *(f"{s:.0%} pruned" for s in SPARSITIES)]
    save_png(ROOT / "docs" / "miniature.png", grid(rows, captions, smallest=128))


if __name__ == "__main__":
    main()
