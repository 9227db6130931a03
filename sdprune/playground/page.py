"""The page in the browser, on Gradio: a thin layer over the playground."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is told to anybody
try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from gradio.networking import setup_tunnel
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
_FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
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
        gr.HTML(_head(playground), elem_id="head")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(start.prompt, label="prompt", lines=1, max_lines=3, elem_id="prompt")
                examples = gr.Examples([[one] for one in playground.module.samples], prompt, label="examples")
                parts = [_component(playground, name, choice) for name, choice in start.choices.items()]
                with gr.Row(equal_height=True):
                    seed = gr.Number(start.seed, label="seed of the noise", precision=0, min_width=120, elem_id="seed")
                    draw = gr.Button("Draw", variant="primary", min_width=120, elem_id="draw")
                counted = gr.HTML(elem_id="zeros")
            with gr.Column(scale=3, min_width=300):
                notice = gr.HTML(elem_id="notice")
                pictures = gr.HTML(elem_id="pair")
                with gr.Row(equal_height=True):
                    moved = gr.Dropdown(
                        playground.components, value=playground.components[-1], label="component", min_width=120,
                        elem_id="moved",
                    )  # fmt: skip
                    many = gr.Button("Draw at many sparsities", min_width=160, elem_id="many")
                strip = gr.HTML(elem_id="strip")
                with gr.Row():
                    slider = gr.ImageSlider(
                        label="dense | pruned", format="png", interactive=False, elem_id="slider", max_height=400,
                        buttons=["fullscreen"], scale=3, min_width=280,
                    )  # fmt: skip
                    with gr.Column(scale=2, min_width=200):
                        said = gr.HTML(elem_id="scores")
        with gr.Accordion("This as a command and as a configuration", open=False):
            command = gr.Code(
                label="command", language="shell", interactive=False, elem_id="command", wrap_lines=True,
                show_line_numbers=False,
            )  # fmt: skip
            config = gr.Code(label="seen.yaml", language="yaml", interactive=False, elem_id="config", max_lines=30)
        inputs: list[Any] = [prompt, seed, *(control for part in parts for control in part)]
        showing: dict[str, Any] = {
            "fn": partial(_show, playground, origin), "inputs": inputs, "preprocess": False,
            "outputs": [notice, slider, pictures, said, counted, command, config], "show_progress": "minimal", **_QUEUE,
        }  # fmt: skip
        changes = [control.change for part in parts for control in part]
        gr.on(
            [page.load, prompt.submit, seed.change, draw.click, *changes], trigger_mode="always_last", api_name="show",
            **showing,
        )  # fmt: skip
        examples.load_input_event.then(**showing)
        many.click(
            partial(_strip, playground), [moved, *inputs], [notice, strip], preprocess=False, trigger_mode="once",
            show_progress="minimal", api_name="strip", **_QUEUE,
        )  # fmt: skip
        for sparsity, _, _, granularity in parts:
            granularity.input(_pattern, granularity, sparsity, show_progress="hidden", api_visibility="private")
    return page


def listen(host: str, port: int) -> socket.socket:
    """A socket at host and port; port 0 takes a free one.

    Raises:
        InputError: they cannot be used.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0  # those of names that are not found are negative
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise InputError(
            f"--host={host} --port={port} cannot be used: {reason}. Choose others; --port=0 takes a free one."
        ) from error


def serve(page: gr.Blocks, listening: socket.socket, share: bool) -> None:
    """Let browsers see the page, until the process is interrupted.

    Args:
        page: from `build`.
        listening: from `listen`.
        share: let Gradio make a link that anybody on the internet can open.
    """
    host, port = listening.getsockname()[:2]
    page.queue(max_size=32, api_open=False)
    app = gr.mount_gradio_app(
        FastAPI(), page, "/", host, port, css_paths=_CSS, theme=_theme(), ssr_mode=False,
        footer_links=[], enable_monitoring=False,
    )  # fmt: skip
    link = _shared(page, host, port) if share else f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"playground {link}   (Ctrl-C ends it)", flush=True)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])


def _theme() -> gr.themes.Base:
    """Gradio's own, with text on buttons that has a contrast of 4.5:1."""
    theme = gr.themes.Default(primary_hue="blue", **_FONTS)
    return theme.set(
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_700",
    )  # fmt: skip


def _shared(page: gr.Blocks, host: str, port: int) -> str:
    """A link through Gradio's servers."""
    try:
        return setup_tunnel(host, port, page.share_token, None, None)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"--share=true: Gradio gives no link ({error}). Leave it out, and forward the port: ssh -L {port}:{host}:"
            f"{port} MACHINE."
        ) from error


def _head(playground: Playground) -> str:
    """What is drawn, and how."""
    module, sampling = playground.module, playground.module.sampling
    return markup.head(
        "sdprune playground", [module.pipeline.name, *filter(None, [module.given_baseline])],
        f"{sampling.steps} steps, guidance {sampling.guidance:g}, the same noise",
    )  # fmt: skip


def _component(playground: Playground, name: str, choice: Choice) -> list[Any]:
    """The controls of a component."""
    with gr.Group():
        sparsity = gr.Slider(
            0, 1, choice.sparsity, step=0.01, label=f"{name}: sparsity", elem_id=f"{name}-sparsity", buttons=[]
        )
        with gr.Row():
            criterion = gr.Dropdown(
                playground.criteria, value=choice.criterion, label="criterion", min_width=130,
                elem_id=f"{name}-criterion",
            )  # fmt: skip
            allocation = gr.Dropdown(
                playground.allocations, value=choice.allocation, label="allocation", min_width=130,
                elem_id=f"{name}-allocation",
            )  # fmt: skip
            granularity = gr.Dropdown(
                playground.granularities, value=choice.granularity, label="granularity", min_width=130,
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
