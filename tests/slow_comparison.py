"""A metric whose comparison takes long, for processes that wait for each other only briefly."""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from sdprune.metrics import CLIPScore


class SlowComparison(CLIPScore):
    """The CLIP score, compared after SLOW_COMPARISON seconds; meanwhile nothing collective may take longer than 4."""

    def compute(self, rows, reference=None):
        if dist.is_initialized():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4))
        return super().compute(rows, reference)

    def compare(self, rows, dense_rows, reference=None):
        time.sleep(float(os.environ.get("SLOW_COMPARISON", "0")))
        return super().compare(rows, dense_rows, reference)
