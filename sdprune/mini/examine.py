"""Measure what a miniature can do: `python -m sdprune.mini.examine runs/miniature --n=256 --seed=11`."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sdprune.errors import InputError
from sdprune.mini.examiner import Examiner, Reading, judge
from sdprune.mini.world import Scene, scenes

GOALS = {
    "real pictures: attribute": 98, "real pictures: object": 98, "real pictures: relation": 98,
    "real pictures: count": 98, "real pictures: background": 98,
    "one object: colour and shape": 95, "two objects: both": 85, "two objects: relation": 85, "several: count": 80,
    "VAE, dB": 34, "evaluator: caption above its twin": 95, "evaluator: first among 64": 95,
}  # fmt: skip
BATCH = 64


def real(chosen: Sequence[Scene]) -> Tensor:
    """Rendered scenes, uint8 [n, 3, 64, 64]."""
    return torch.stack([torch.tensor(scene.render()).permute(2, 0, 1) for scene in chosen])


def judged(chosen: Sequence[Scene], readings: Sequence[Reading], group: str = "") -> Iterator[tuple[str, bool]]:
    """Each judgement of a picture under what it is about; with a group all begin with this."""
    for scene, reading in zip(chosen, readings, strict=True):
        found = judge(scene.content, reading)
        if group:
            yield from ((f"{group}: {category}", right) for category, right in found.items())
            continue
        kinds = [replace(thing, kind=thing.kind._replace(size="medium")) for thing in reading.things]
        anyhow = judge(
            replace(scene.content, kinds=tuple(kind._replace(size="medium") for kind in scene.content.kinds)),
            Reading(reading.background, kinds),
        )
        if scene.category == "attribute":
            yield "one object: colour and shape", anyhow["attribute"]
            yield "one object: size too", found["attribute"]
        elif scene.category == "count":
            yield "several: count", len(reading.things) == scene.content.count
            yield "several: count, colour and shape", anyhow["count"]
        else:
            yield "two objects: both", anyhow["object"]
            yield "two objects: sizes too", found["object"]
            yield "two objects: both, and the relation", anyhow["relation"]
            if anyhow["object"]:
                yield "two objects: relation", anyhow["relation"]
        yield "any: background", found["background"]
        yield "any: all that is said", all(found.values())


def draw(directory: Path, chosen: Sequence[Scene], steps: int, guidance: float) -> Tensor:
    """The pipeline's pictures of the full captions; noise by place in the list."""
    from sdprune.pipelines import Sampling
    from sdprune.pipelines.sampling import image_seed
    from sdprune.pipelines.stable_diffusion import StableDiffusion

    model = StableDiffusion(str(directory / "pipeline"))
    model.load(torch.float32, torch.device("cpu"))
    captions = [scene.captions[0] for scene in chosen]
    seeds = [image_seed(0, place) for place in range(len(captions))]
    parts = [slice(start, start + BATCH) for start in range(0, len(captions), BATCH)]
    sampling = Sampling(steps=steps, guidance=guidance)
    return torch.cat([model.generate(captions[part], seeds[part], sampling).images for part in parts])


@torch.no_grad()
def decibels(directory: Path, pictures: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio after the VAE."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(directory).float()
    errors = []
    for part in pictures.split(BATCH):
        pixels = part.float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((decoded - pixels) / 2).square().mean((1, 2, 3)))
    return float(-10 * torch.cat(errors).log10().mean())


def matching(directory: Path, chosen: Sequence[Scene]) -> Iterator[tuple[str, bool]]:
    """Whether the evaluator tells a caption from the one with both objects swapped, and from 63 other captions."""
    from sdprune.metrics import ClipImageFeatures

    clip = ClipImageFeatures(str(directory / "evaluator"))
    pairs = [scene for scene in chosen if scene.category == "relation"]
    twins = [replace(scene.content, kinds=scene.content.kinds[::-1]) for scene in pairs]
    images = torch.nn.functional.normalize(clip(real(pairs)))
    texts, others = (
        torch.nn.functional.normalize(clip.text_embeddings([content.captions[0] for content in contents]))
        for contents in ([scene.content for scene in pairs], twins)
    )
    above = (images * texts).sum(1) > (images * others).sum(1)
    yield from (("evaluator: caption above its twin", bool(right)) for right in above)
    distinct = list({scene.content.picture: scene for scene in chosen}.values())
    for start in range(0, len(distinct) - 63, 64):
        part = distinct[start : start + 64]
        similar = (
            clip(real(part))
            @ torch.nn.functional.normalize(clip.text_embeddings([scene.captions[0] for scene in part])).T
        )
        yield from (("evaluator: first among 64", bool(right)) for right in similar.argmax(1) == torch.arange(64))


def measure(
    directory: Path, n: int, seed: int, steps: int, guidance: float, split: str
) -> dict[str, tuple[float, int]]:
    """Every number by name, with how many pictures stand behind it; what is not trained yet is left out."""
    chosen = list(scenes(split, n, seed))
    pictures = real(chosen)
    examiner = Examiner.load(directory / "examiner")
    answers: dict[str, list[bool]] = defaultdict(list)

    def note(found: Iterator[tuple[str, bool]]) -> None:
        for name, right in found:
            answers[name].append(right)

    note(judged(chosen, examiner.read(pictures), "real pictures"))
    table = {}
    if (directory / "pipeline").is_dir():
        note(judged(chosen, examiner.read(draw(directory, chosen, steps, guidance))))
    if (directory / "evaluator").is_dir():
        note(matching(directory, chosen))
    for vae in ("pipeline", "parts"):
        if (directory / vae / "vae").is_dir():
            table["VAE, dB"] = decibels(directory / vae / "vae", pictures), n
            break
    return {name: (100 * sum(right) / len(right), len(right)) for name, right in answers.items()} | table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sdprune.mini.examine",
        description="Measure a miniature against its goals, on combinations of attributes that training never saw.",
    )
    parser.add_argument("directory", type=Path, help="where the stages were trained into, such as runs/miniature")
    parser.add_argument("--n", type=int, default=256, help="number of scenes (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--guidance", type=float, default=2.5, help="guidance scale (default 2.5)")
    parser.add_argument("--split", default="val", help="val, or train for combinations that training saw")
    options = vars(parser.parse_args(arguments))
    try:
        if options["n"] < 1:
            raise InputError(f"--n is {options['n']}: give 1 or more.")
        if not (options["directory"] / "examiner").is_dir():
            raise InputError(
                f"{options['directory']}/examiner is missing: run sdprune fit --config mini/examiner first."
            )
        found = measure(**options)
    except InputError as error:
        print(f"sdprune: error: {error}", file=sys.stderr)
        return 2
    for name, (value, n) in found.items():
        goal = f"  goal {GOALS[name]}" if name in GOALS else ""
        print(f"{name:40}{value:8.1f}   n = {n}{goal}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
