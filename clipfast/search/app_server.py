"""The page of ``clipfast app`` in Gradio, served to this machine alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..evaluation.zero_shot import TEMPLATES
from .app import MAX_MAPS, Desk, answer

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by which a browser may call it: not by a stranger's name that leads here
FILES = ("file=", "file/", "proxy=")  # what stands before the file in those addresses of Gradio that serve one
MAX_UPLOAD = "50mb"
KEPT = 3600  # seconds after which uploads are removed
SESSIONS = 16  # whose state Gradio keeps, 100 KB for each that asks: here it is the same for all
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
CLICK = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-row], [data-similar]');
  if (chosen?.dataset.row) trigger('click', {row: Number(chosen.dataset.row)});
  if (chosen?.dataset.similar) trigger('select', {row: Number(chosen.dataset.similar)});
});
watch('value', () => {
  const shown = element.querySelector('.detail, [role=status], [role=alert]');
  const top = shown?.getBoundingClientRect().top;
  if (top < 0 || top > innerHeight * 0.7) shown.scrollIntoView();
});
"""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Stands before Gradio: no file is served but uploads, and the page loads nothing from elsewhere.

    Args:
        app: what is guarded.
        uploads: the folder of the uploads.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], uploads: Path) -> None:
        self.app, self.uploads = app, uploads.resolve()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and not self._allows(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not served\n"})
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, answer)

    def _allows(self, path: str) -> bool:
        """Return False for the address of a file that is no upload."""
        for mark in FILES:
            _, found, file = path.partition(f"/{mark}")
            if found:
                try:
                    return Path(file).resolve().is_relative_to(self.uploads)
                except (OSError, ValueError):  # a name that no file can have
                    return False
        return True


def check_port(port: int) -> None:
    """Refuse a port that cannot be used.

    Raises:
        ValueError: it is no port, or somebody uses it.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise ValueError(f"--port {port} may not be used by this user: give one from 1024 on") from None
        except OSError:
            raise ValueError(f"--port {port} is in use: give another one") from None


@contextlib.contextmanager
def serving(desk: Desk, title: str, port: int, *, browser: bool = False) -> Iterator[str]:
    """Serve the page while the context lasts; the value is its address.

    Args:
        desk: what is asked.
        title: of the page; as text.
        port: to listen on.
        browser: open the page in the user's browser.

    Raises:
        ValueError: the port cannot be used.
    """
    check_port(port)
    with tempfile.TemporaryDirectory(prefix="clipfast-app-") as folder:
        # Gradio reads these when it is imported, or when a page is made.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        page = _page(desk, title)
        css = files("clipfast").joinpath("assets/app.css").read_text(encoding="utf-8")
        guards = [Middleware(Guard, uploads=Path(folder)), Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES))]
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=port, share=False, inbrowser=browser, quiet=True, css=css,
                prevent_thread_lock=True, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
                allowed_paths=[], max_file_size=MAX_UPLOAD, footer_links=[], app_kwargs={"middleware": guards},
                state_session_capacity=SESSIONS,
            )  # fmt: skip
            yield address
        finally:
            page.close(verbose=False)


def wait(said: str) -> None:
    """Print a line, and wait for Ctrl-C or for a signal to end, which may come as soon as that is read."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        print(said, flush=True)
        threading.Event().wait()


def _page(desk: Desk, title: str) -> Any:
    """Return the page."""
    import gradio

    with gradio.Blocks(title="clipfast app", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(title)
        with gradio.Tabs():
            with gradio.Tab("Search"):
                _search_tab(desk)
            with gradio.Tab("Classify"):
                _classify_tab(desk)
            with gradio.Tab("Heat maps"):
                _heat_map_tab(desk)
    return page


def _picture_field(**options: Any) -> Any:
    """Return a field for a picture, whose value is the file: what is in it is looked at by :class:`Desk` alone."""
    import gradio

    field: Any = gradio.Image(type="filepath", sources=["upload", "clipboard"], height=220, **options)
    # not a subclass, for which Gradio would write a file beside this one
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def _search_tab(desk: Desk) -> None:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            words = gradio.Textbox(label="Words", placeholder="a red apple", elem_id="words")
            picture = _picture_field(label="Picture", elem_id="picture")
            button = gradio.Button("Search", variant="primary", elem_id="search")
            weight = gradio.Slider(0, 1, 0.5, step=0.05, label="Weight of the words, if there is a picture too")
            where = gradio.Textbox(
                label="Filter", placeholder="width >= 256 and caption contains cat", elem_id="where", max_lines=1
            )
            gradio.HTML(desk.columns())
            k = gradio.Number(24, label="Results", precision=0, elem_id="k")
        with gradio.Column(scale=3, min_width=320):
            detail = gradio.HTML(js_on_load=CLICK, elem_id="detail")
            results = gradio.HTML(js_on_load=CLICK, elem_id="results")

    def search(*given: Any) -> str:
        return answer(desk.search, *given)

    def show(event: gradio.EventData) -> str:
        return answer(desk.detail, event.row)

    def similar(where: str, k: float, event: gradio.EventData) -> str:
        return answer(desk.similar, event.row, where, k)

    # names of annotations are looked up by Gradio among globals, where gradio is not
    for function in (show, similar):
        function.__annotations__["event"] = gradio.EventData
    fields = [words, picture, weight, where, k]
    gradio.on(
        [button.click, words.submit, where.submit], search, fields, results, api_name="search", show_progress="minimal"
    ).then(lambda: "", None, detail, api_visibility="private")
    results.click(show, None, detail, api_visibility="private", show_progress="hidden")
    detail.select(similar, [where, k], results, api_visibility="private", show_progress="minimal")


def _classify_tab(desk: Desk) -> None:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            picture = _picture_field(label="Picture", elem_id="classified")
            labels = gradio.Textbox(label="Labels, one in each line", lines=6, max_lines=20, elem_id="labels")
            templates = gradio.Dropdown(list(TEMPLATES), value="simple", label="Templates", elem_id="templates")
            button = gradio.Button("Classify", variant="primary", elem_id="classify")
        with gradio.Column(scale=3, min_width=320):
            result = gradio.HTML(elem_id="shares")

    def classify(*given: Any) -> str:
        return answer(desk.classify, *given)

    button.click(classify, [picture, labels, templates], result, api_name="classify", show_progress="minimal")


def _heat_map_tab(desk: Desk) -> None:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            picture = _picture_field(label="Picture", elem_id="mapped")
            texts = gradio.Textbox(label="Texts, one in each line", lines=4, max_lines=MAX_MAPS, elem_id="texts")
            button = gradio.Button("Show where they are", variant="primary", elem_id="map")
        with gradio.Column(scale=3, min_width=320):
            result = gradio.HTML(elem_id="maps")

    def heat_map(*given: Any) -> str:
        return answer(desk.heat_map, *given)

    button.click(heat_map, [picture, texts], result, api_name="heat_map", show_progress="minimal")
