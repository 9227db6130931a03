"""How long the playground takes, from a key pressed in a browser to the picture on its page.

    SDPRUNE_BENCHMARK=1 pytest -n 0 -s tests/benchmarks/test_playground_time.py

measures the trained miniature at its 20 steps, with a metric of each picture. Otherwise the untrained one draws in two.
"""

import os
import statistics
import time

from test_playground_page import options, serving, type_in

from sdprune.mini.captions import SHAPES

FULL = os.environ.get("SDPRUNE_BENCHMARK") == "1"
CHANGES = 8 if FULL else 2
SECONDS = 2


def seconds(page, change, seen):
    """From the change until the page shows what it did not show."""
    started = time.monotonic()
    change()
    page.locator(seen).first.wait_for()
    return time.monotonic() - started


def test_from_a_key_to_the_picture(runs, chromium):
    """A change of a sparsity is seen within two seconds on two cores (median), on the trained miniature."""
    small = [] if FULL else options(runs)
    with serving(["--config", "mini/playground", *small, f"--model.store={runs}/statistics"]) as (_, address):
        page = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.locator("#pair img").first.wait_for()
        changes = [
            seconds(
                page, lambda share=share: type_in(page, "#unet-sparsity", str(share / 100)),
                f"#pair figcaption:has-text('unet {share}%')",
            ) for share in range(30, 30 + CHANGES)
        ]  # fmt: skip
        prompts = [
            seconds(
                page, lambda shape=shape: type_in(page, "#prompt", f"a red {shape}"),
                f"#pair img[alt='pruned: a red {shape}']",
            ) for shape in SHAPES[:CHANGES]
        ]  # fmt: skip
        page.context.close()
    change, prompt = statistics.median(changes), statistics.median(prompts)
    print(f"\na sparsity {change:.2f} s ({max(changes):.2f} at most), a prompt {prompt:.2f} s ({max(prompts):.2f})")
    assert not FULL or change <= SECONDS
