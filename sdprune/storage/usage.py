"""The flags and the help of `pack` and `unpack`."""

from __future__ import annotations

import argparse

from sdprune.verb import Verb, path

PACK = Verb(
    "sdprune pack", "sdprune pack DIR --out DIR [--compression {zstd,none}]", allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Copy the directory of a pruned model, with its safetensors as compact files: zeros take one bit each, and what is left
is compressed. Nothing is lost: `sdprune unpack` gives the same files back, byte for byte. `sdprune predict` and
`sdprune.load` read a packed directory as it is; diffusers itself does not.

  sdprune pack runs/pruned --out runs/packed""",
)  # fmt: skip
PACK.add_argument("directory", type=path, metavar="DIR", help="of a model or a pipeline, with safetensors")
PACK.add_argument("--out", type=path, metavar="DIR", help="where to: a new directory")
PACK.add_argument(
    "--compression", choices=("zstd", "none"), default="zstd",
    help="of masks and values, where it makes them smaller; zstd by default",
)  # fmt: skip

UNPACK = Verb(
    "sdprune unpack", "sdprune unpack DIR --out DIR", allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Copy a directory that `sdprune pack` made, with its compact files as the safetensors that they were, byte for byte.
Each tensor is compared with its checksum.""",
)  # fmt: skip
UNPACK.add_argument("directory", type=path, metavar="DIR", help="with compact files")
UNPACK.add_argument("--out", type=path, metavar="DIR", help="where to: a new directory")
