"""Writes small datasets in COCO's own layout, for tests."""

import json
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

FILE_NAMES = {"train2014": "COCO_train2014_{:012d}.jpg", "train2017": "{:012d}.jpg"}


def write_coco(
    root: Path, n: int = 12, split: str = "train2017", captions: Optional[list[tuple[int, str]]] = None
) -> Path:
    """Write `n` images with ids 7, 14, ... and five captions each, shuffled, or the (image id, caption) pairs given."""
    ids = [7 * (k + 1) for k in range(n)]
    names = {image_id: FILE_NAMES.get(split, "{:012d}.jpg").format(image_id) for image_id in ids}
    pairs = captions or shuffled([(image_id, f"caption {k} of {image_id}") for image_id in ids for k in range(5)])
    content = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in names.items()],
        "annotations": [{"id": k, "image_id": image_id, "caption": text} for k, (image_id, text) in enumerate(pairs)],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    for image_id, name in names.items():
        picture(image_id).save(root / split / name)
    return root


def picture(image_id: int) -> Image.Image:
    """Return a flat picture 12 wide and 8 high whose grey level is the id."""
    return Image.new("RGB", (12, 8), (image_id % 256,) * 3)


def shuffled(pairs: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the pairs in an order of their own, the same every time."""
    return [pairs[k] for k in np.random.RandomState(3).permutation(len(pairs))]


def edit(root: Path, change: object, split: str = "train2017") -> None:
    """Apply the function `change` to the parsed annotation file, in place."""
    file = root / "annotations" / f"captions_{split}.json"
    content = json.loads(file.read_text())
    change(content)  # type: ignore[operator]
    file.write_text(json.dumps(content))
