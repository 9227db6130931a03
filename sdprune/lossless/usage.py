"""The flags and the help of `lossless`."""

from __future__ import annotations

import argparse

from sdprune.verb import Verb, path, whole

LOSSLESS = Verb(
    "sdprune lossless", "sdprune lossless MODEL --out DIR [--keep PATTERN] [--tables --steps N] ...",
    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Copy a model without the layers that no picture depends on: what is drawn from text stays the same to the bit. What
depends on what is found by following pictures that are drawn without numbers; then pictures are drawn by both models
and compared, and nothing is written if they differ.

  sdprune lossless runs/pruned --out runs/lossless""",
)  # fmt: skip
LOSSLESS.add_argument("model", type=path, metavar="MODEL", help="a diffusers directory, a hub id, or miniature")
LOSSLESS.add_argument("--out", type=path, metavar="DIR", help="where to: a new directory")
LOSSLESS.add_argument(
    "--keep", action="append", default=[], metavar="PATTERN",
    help="modules that stay, as in vae or text_encoder.final_layer_norm, with * for any letters; one of which a part "
    "is named stays as a whole; may be given again. Pictures that begin with a picture need the encoder of the VAE: "
    "--keep=vae",
)  # fmt: skip
LOSSLESS.add_argument(
    "--tables", action="store_true",
    help="replace the denoiser's layers that see the timestep alone by a table of what they give; the copy then draws "
    "in --steps steps of the --scheduler alone, and only sdprune loads it",
)  # fmt: skip
LOSSLESS.add_argument(
    "--steps", type=whole, metavar="N", help="denoising steps of the pictures, and of the tables; 2 without tables"
)
LOSSLESS.add_argument("--scheduler", metavar="CLASS", help="of diffusers, in place of the model's own")
LOSSLESS.add_argument("--size", type=whole, metavar="N", help="height and width of the pictures; the model's own")
LOSSLESS.add_argument(
    "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
    help="of the weights when the pictures are drawn; the files keep theirs. float32 by default",
)  # fmt: skip
LOSSLESS.add_argument(
    "--device", default="cpu", metavar="NAME", help="where pictures are drawn, as in cuda; cpu by default"
)
LOSSLESS.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of a hub id")
LOSSLESS.add_argument("--variant", metavar="NAME", help="file variant of the weights, e.g. fp16")
LOSSLESS.add_argument(
    "--pipeline", metavar="CLASS", help="a family of your own, MODULE.CLASS; by default the model's index decides"
)
