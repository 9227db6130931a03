"""The page in the browser, on Gradio: a thin layer over the playground."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is told to anybody
try:
    import gradio as gr
except ImportError as error:
    from sdprune.errors import InputError

    raise InputError(f"The playground needs Gradio ({error}): pip install 'sdprune[playground]'.") from error

from sdprune.calibration.progress import CalibrationState
from sdprune.errors import InputError
from sdprune.playground import markup
from sdprune.playground.core import Playground
from sdprune.playground.view import PUBLISHED, Choice, Origin, View
from sdprune.pruning import PruneSpec

STRIP = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""The sparsities of the strip."""
_CSS = Path(__file__).with_name("page.css")
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""One model: one visitor after another."""


def build(playground: Playground, origin: Origin) -> gr.Blocks:
    """The page.

    Args:
        playground: loaded.
        origin: what it was started with.
    """
    start = playground.start
    with gr.Blocks(title="sdprune playground", delete_cache=(600, 600), analytics_enabled=False) as page:
        gr.Markdown(f"# sdprune playground\n`{playground.module.pipeline.name}`, dense and pruned, from the same noise")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(start.prompt, label="prompt", lines=1, max_lines=3, elem_id="prompt")
                gr.Examples([[one] for one in playground.module.samples], prompt, label="examples")
                parts = [_component(playground, name, choice) for name, choice in start.choices.items()]
                seed = gr.Number(start.seed, label="seed of the noise", precision=0, elem_id="seed")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=340):
                notice = gr.HTML(elem_id="notice")
                slider = gr.ImageSlider(
                    label="dense | pruned", format="png", interactive=False, elem_id="slider", buttons=["fullscreen"]
                )
                pictures = gr.HTML(elem_id="pair")
                with gr.Row():
                    said = gr.HTML(elem_id="scores", min_height=20)
                    counted = gr.HTML(elem_id="zeros", min_height=20)
        with gr.Row(equal_height=True):
            moved = gr.Dropdown(list(start.choices), value=list(start.choices)[-1], label="component", scale=1)
            many = gr.Button("Draw it at many sparsities", scale=2, elem_id="many")
        strip = gr.HTML(elem_id="strip")
        with gr.Accordion("This as a command and as a configuration", open=False):
            command = gr.Code(label="command", language="shell", interactive=False, elem_id="command", wrap_lines=True)
            config = gr.Code(label="seen.yaml", language="yaml", interactive=False, elem_id="config", max_lines=30)
        inputs: list[Any] = [prompt, seed, *(control for part in parts for control in part)]
        outputs = [notice, slider, pictures, said, counted, command, config]
        changes = [control.change for part in parts for control in part]
        gr.on(
            [page.load, prompt.submit, prompt.change, seed.change, draw.click, *changes],
            partial(_show, playground, origin), inputs, outputs, preprocess=False, trigger_mode="always_last",
            show_progress="minimal", api_name="show", **_QUEUE,
        )  # fmt: skip
        many.click(
            partial(_strip, playground), [moved, *inputs], [notice, strip], preprocess=False, trigger_mode="once",
            show_progress="minimal", api_name="strip", **_QUEUE,
        )  # fmt: skip
        for sparsity, _, _, granularity in parts:
            granularity.input(_pattern, granularity, sparsity, show_progress="hidden", api_visibility="private")
    return page


def serve(page: gr.Blocks, host: str, port: int, share: bool, block: bool = True) -> str:
    """Let browsers see the page.

    Args:
        page: from `build`.
        host: address that it is bound to.
        port: 0 takes a free one.
        share: let Gradio make a link that anybody on the internet can open.
        block: until the process is interrupted.

    Returns:
        Its address.

    Raises:
        InputError: the port is taken.
    """
    page.queue(max_size=32, api_open=False)
    try:
        _, address, shared = page.launch(
            server_name=host, server_port=port or None, share=share, prevent_thread_lock=True, quiet=True,
            css_paths=_CSS, theme=gr.themes.Default(**_FONTS), ssr_mode=False, footer_links=[], show_error=True,
            enable_monitoring=False, mcp_server=False, pwa=False,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--port={port} cannot be used on {host}: {error}. Choose another one.") from error
    print(f"playground {shared or address}   (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return str(address)


def _component(playground: Playground, name: str, choice: Choice) -> list[Any]:
    """The controls of a component."""
    with gr.Group():
        sparsity = gr.Slider(
            0, 1, choice.sparsity, step=0.01, label=f"{name}: sparsity", elem_id=f"{name}-sparsity", buttons=[]
        )
        with gr.Row():
            criterion = gr.Dropdown(
                playground.criteria, value=choice.criterion, label="criterion", min_width=100,
                elem_id=f"{name}-criterion",
            )  # fmt: skip
            allocation = gr.Dropdown(
                playground.allocations, value=choice.allocation, label="allocation", min_width=100,
                elem_id=f"{name}-allocation",
            )  # fmt: skip
            granularity = gr.Dropdown(
                playground.granularities, value=choice.granularity, label="granularity", min_width=100,
                allow_custom_value=True, elem_id=f"{name}-granularity",
            )  # fmt: skip
    return [sparsity, criterion, allocation, granularity]


def _pattern(granularity: str) -> Any:
    """N:M sets the sparsity."""
    try:
        found = PruneSpec(granularity=None if granularity == PUBLISHED else granularity, criterion="Magnitude")  # type: ignore[arg-type]
    except InputError:
        return gr.skip()
    return found.sparsity if found.pattern else gr.skip()


def _view(playground: Playground, prompt: Any, seed: Any, controls: tuple[Any, ...]) -> View:
    whole = int(seed) if isinstance(seed, float) and seed.is_integer() else seed
    parts = [controls[start : start + 4] for start in range(0, len(controls), 4)]
    choices = {name: Choice(*part) for name, part in zip(playground.components, parts, strict=True)}
    return View(str(prompt or ""), whole, choices)


def _show(playground: Playground, origin: Origin, prompt: Any, seed: Any, *controls: Any) -> list[Any]:
    playground.module.on_calibration = _reporting()
    try:
        shown = playground.show(_view(playground, prompt, seed, controls))
    except InputError as error:
        return [markup.bad(str(error)), *[gr.skip()] * 6]
    return [
        markup.notes(shown.remarks), (shown.dense, shown.pruned), markup.pair(shown), markup.scores(shown),
        markup.zeros(shown.sparsity), origin.command(shown.view), origin.yaml(shown.view),
    ]  # fmt: skip


def _strip(playground: Playground, component: str, prompt: Any, seed: Any, *controls: Any) -> Iterator[list[Any]]:
    playground.module.on_calibration = _reporting()
    found: list[Any] = []
    try:
        view = _view(playground, prompt, seed, controls).checked()
        for one in playground.strip(view, component, STRIP):
            found.append(one)
            yield ["", markup.strip(view.prompt, component, found)]
    except InputError as error:
        yield [markup.bad(str(error)), gr.skip()]


def _reporting() -> Callable[[CalibrationState], None]:
    """Shows on the page how far the gathering of statistics is."""
    progress = gr.Progress()

    def report(state: CalibrationState) -> None:
        if state.number <= state.passes:
            done = (state.number - 1 + state.done / max(1, state.images)) / state.passes
            progress(done, desc=f"gathering statistics of {state.what}")

    return report
