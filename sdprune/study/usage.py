"""The help of the study's verbs, which answers without importing what they need."""

SWEEP = """usage: sdprune sweep FILE [FILE ...] [--jobs=N] [--dry-run] [--option=value ...]

Run every cell of W&B sweep files (method: grid) here, without a server. Each cell is the command that `wandb agent`
would start, without --wandb; options given here are added to all of them. All cells are checked before the first one
starts. A finished cell is not run again, and one that failed is tried again, when the same command is given again. At
the end a table for each file shows the cells by the score that its `metric:` names. When the first three cells fail
alike, the sweep stops.

  sdprune sweep wandb_sweeps/mini_methods_unet.yaml --data.n=64

  --jobs=N   run N cells at once, each job on its share of the cores; 1 by default. Bits of images depend on the number
             of threads: set OMP_NUM_THREADS to have the same with any number of jobs.
  --dry-run  list the commands and check them, run none

Exit code: 0 when every cell is done, 1 when one failed, 2 when one can be seen to be wrong before it runs.
"""
REPORT = """usage: sdprune report DIR [DIR ...] [--out=DIR] [--reference=FILE]

Make the study's tables and figures from the runs below these directories: report.html (one page with everything in it),
report.md, figures/ and tables/*.csv. Runs of unlike prompts, noise, sampling or protocol are reported apart.
Damaged and unfinished runs are left out, and named.

  --out=DIR          where to; <first DIR>/report by default
  --reference=FILE   results of others to stand beside, a CSV with text_method, unet_method, text_sparsity,
                     unet_sparsity, fid and clip_score; the published ones stand beside runs of SD2 anyway
"""
