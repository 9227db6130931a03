"""The help of the study's verbs, which answers without importing what they need."""

SWEEP = """usage: sdprune sweep FILE [FILE ...] [--option=value ...]

Run every cell of W&B sweep files (method: grid) here, without a server. Each cell is the command that `wandb agent`
would start, without --wandb; options given here are added to all of them. A finished cell is not run again, and one
that failed is tried again, when the same command is given again.

  sdprune sweep wandb_sweeps/mini_methods_unet.yaml --data.n=64

  --jobs=N   run N cells at once, each in a process of its own; 1 by default

Exit code: 0 when every cell is done, else 1.
"""
REPORT = """usage: sdprune report DIR [DIR ...] [--out=DIR] [--reference=FILE]

Make the study's tables and figures from the runs below these directories: report.html (one page with everything in it),
report.md, figures/ and tables/*.csv. Runs of unlike prompts, noise, sampling or protocol are reported apart.

  --out=DIR          where to; <first DIR>/report by default
  --reference=FILE   results of others to stand beside, a CSV with text_method, unet_method, text_sparsity,
                     unet_sparsity, fid and clip_score; the published ones stand beside runs of SD2 anyway
"""
