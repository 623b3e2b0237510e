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

from ..evaluation.arguments import DEFAULT_TEMPLATES
from ..evaluation.zero_shot import TEMPLATES
from .app import FOUND, MAX_MAPS, Desk, answer

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by which a browser may call it: not by a stranger's name that leads here
FILES = ("file=", "file/", "proxy=")  # what stands before the file in those addresses of Gradio that serve one
MAX_UPLOAD, MAX_REQUEST = 50 * 2**20, 2**20  # bytes of a request with files, and of others
UPLOAD = "/gradio_api/upload"
POSTED = (UPLOAD, "/gradio_api/call/", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
KEPT = 3600  # seconds after which uploads are removed
KEPT_FILES, KEPT_BYTES = 50, 4 * MAX_UPLOAD  # of uploads, of which the oldest go
AT_ONCE = 4  # uploads that are received at the same time
SESSIONS = 16  # whose state Gradio keeps, 100 KB for each that asks: here it is the same for all
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
CLICK = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-row], [data-similar], [data-words]');
  if (chosen?.dataset.words) trigger('click', {words: chosen.dataset.words});
  if (chosen?.dataset.row) {
    element.querySelector('[aria-current]')?.removeAttribute('aria-current');
    chosen.setAttribute('aria-current', 'true');
    trigger('click', {row: Number(chosen.dataset.row)});
  }
  if (chosen?.dataset.similar) trigger('select', {row: Number(chosen.dataset.similar)});
});
watch('value', () => {
  const shown = element.querySelector('.detail, [role=status], [role=alert]');
  const top = shown?.getBoundingClientRect().top;
  if (top < 0 || top > innerHeight * 0.7) shown.scrollIntoView();
});
"""
SAID = {"common.complete": "done"}  # Gradio says the key itself to screen readers, after each answer
NARROW = "() => { if (innerWidth < 640) document.querySelector('#more button')?.click() }"  # results come soon
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Stands before Gradio: only its own page may ask, no file is served but uploads, and these are bounded.

    A page of another origin can send requests to this machine, though it cannot read the answers.

    Args:
        app: what is guarded.
        uploads: the folder of the uploads.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], uploads: Path) -> None:
        self.app, self.uploads, self.receiving = app, uploads.resolve(), 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        status = self._refusal(scope) if scope["type"] == "http" else None
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
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

        if scope["type"] != "http" or scope["path"] != UPLOAD:
            await self.app(scope, receive, answer)
            return
        self.receiving += 1
        try:
            self._tidy()
            await self.app(scope, receive, answer)
        finally:
            self.receiving -= 1
            self._tidy()

    def _refusal(self, scope: Message) -> int | None:
        """Return the status that refuses a request; None if it may be answered."""
        given, path = dict(scope["headers"]), scope["path"]
        own = b"http://" + given.get(b"host", b"")
        is_foreign = given.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none") and path != "/"  # a link
        if is_foreign or given.get(b"origin", own) != own or not self._allows(path):
            return 403
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST" or not path.startswith(POSTED):
            return 403
        length = given.get(b"content-length", b"")
        if not length.isdigit():
            return 411
        if int(length) > (MAX_UPLOAD if path == UPLOAD else MAX_REQUEST):
            return 413
        return 429 if path == UPLOAD and self.receiving >= AT_ONCE else None

    def _tidy(self) -> None:
        """Remove the oldest uploads beyond the number and the bytes that are kept."""
        found = []
        for folder, _, names in os.walk(self.uploads):
            for file in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # Gradio has removed it meanwhile
                    found.append((file.stat(), file))
        found.sort(key=lambda one: one[0].st_mtime_ns, reverse=True)
        total = 0
        for number, (about, file) in enumerate(found):
            total += about.st_size
            if number >= KEPT_FILES or total > KEPT_BYTES:
                file.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the folder of the file, unless it has others
                    if file.parent != self.uploads:
                        file.parent.rmdir()

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
        ValueError: this user may not use it, or somebody uses it.
    """
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
        import gradio
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        page = _page(desk, title, Path(folder).resolve())
        css = files("clipfast").joinpath("assets/app.css").read_text(encoding="utf-8")
        guards = [Middleware(Guard, uploads=Path(folder)), Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES))]
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=port, share=False, inbrowser=browser, quiet=True, css=css,
                i18n=gradio.I18n(en=SAID),
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


def _page(desk: Desk, title: str, uploads: Path) -> Any:
    """Return the page; ``uploads`` is the folder of what is dropped."""
    import gradio

    with gradio.Blocks(title="clipfast app", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(title)
        with gradio.Tabs():
            with gradio.Tab("Search"):
                _search_tab(desk, uploads)
            with gradio.Tab("Classify"):
                _classify_tab(desk, uploads)
            with gradio.Tab("Heat maps"):
                _heat_map_tab(desk, uploads)
        page.load(None, js=NARROW, api_visibility="private")
    return page


def _picture_field(uploads: Path, **options: Any) -> Any:
    """Return a field for a picture, whose value is an upload: what is in it is looked at by :class:`Desk` alone."""
    import gradio

    def uploaded(path: str) -> str:
        try:  # what is elsewhere is refused in the same words whether it exists or not
            file = Path(path).resolve()
            if file.is_relative_to(uploads) and file.is_file():
                return str(file)
        except (OSError, ValueError):  # a name that no file can have
            pass
        raise gradio.Error("the picture is no longer there: drop it again", print_exception=False)

    async def moved(path: str) -> str:
        return uploaded(path)

    field: Any = gradio.Image(type="filepath", sources=["upload", "clipboard"], height=220, **options)
    # not a subclass, for which Gradio would write a file beside this one. Its own check passes over payloads without
    # "meta", and before that it downloads what an address names
    field.async_move_resource_to_block_cache = moved
    field.preprocess = lambda payload: None if payload is None else uploaded(payload.path)
    return field


def _search_tab(desk: Desk, uploads: Path) -> None:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            words = gradio.Textbox(label="Words", elem_id="words")
            button = gradio.Button("Search", variant="primary", elem_id="search")
            samples = gradio.HTML(desk.samples(), js_on_load=CLICK)
            with gradio.Accordion("A picture, a filter, the number of results", elem_id="more"):
                picture = _picture_field(uploads, label="Picture", elem_id="picture")
                weight = gradio.Slider(0, 1, 0.5, step=0.05, label="Weight of the picture, if there are words too")
                where = gradio.Textbox(
                    label="Filter", placeholder="width >= 256 and caption contains cat", elem_id="where", max_lines=1
                )
                gradio.HTML(desk.columns())
                k = gradio.Number(FOUND, label="Results", precision=0, elem_id="k")
        with gradio.Column(scale=3, min_width=320):
            detail = gradio.HTML(js_on_load=CLICK, elem_id="detail")
            results = gradio.HTML(desk.start(), js_on_load=CLICK, elem_id="results")

    def search(*given: Any) -> str:
        return answer(desk.search, *given)

    def show(event: gradio.EventData) -> str:
        return answer(desk.detail, event.row)

    def similar(where: str, k: float, event: gradio.EventData) -> str:
        return answer(desk.similar, event.row, where, k)

    def sample(event: gradio.EventData) -> str:
        return str(event.words)

    # names of annotations are looked up by Gradio among globals, where gradio is not
    for function in (show, similar, sample):
        function.__annotations__["event"] = gradio.EventData
    fields = [words, picture, weight, where, k]
    chosen = samples.click(sample, None, words, api_visibility="private", show_progress="hidden")
    asked = gradio.on(
        [button.click, words.submit, where.submit], search, fields, results, api_name="search", show_progress="minimal"
    )
    for event in (asked, chosen.then(search, fields, results, api_visibility="private", show_progress="minimal")):
        event.then(lambda: "", None, detail, api_visibility="private")
    results.click(show, None, detail, api_visibility="private", show_progress="hidden")
    detail.select(similar, [where, k], results, api_visibility="private", show_progress="minimal")


def _classify_tab(desk: Desk, uploads: Path) -> None:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            picture = _picture_field(uploads, label="Picture", elem_id="classified")
            labels = gradio.Textbox(label="Labels, one in each line", lines=6, max_lines=20, elem_id="labels")
            templates = gradio.Dropdown([*TEMPLATES], value=DEFAULT_TEMPLATES, label="Templates", elem_id="templates")
            button = gradio.Button("Classify", variant="primary", elem_id="classify")
        with gradio.Column(scale=3, min_width=320):
            result = gradio.HTML(js_on_load=CLICK, elem_id="shares")

    def classify(*given: Any) -> str:
        return answer(desk.classify, *given)

    button.click(classify, [picture, labels, templates], result, api_name="classify", show_progress="minimal")


def _heat_map_tab(desk: Desk, uploads: Path) -> None:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            picture = _picture_field(uploads, label="Picture", elem_id="mapped")
            texts = gradio.Textbox(label="Texts, one in each line", lines=4, max_lines=MAX_MAPS, elem_id="texts")
            button = gradio.Button("Show where they are", variant="primary", elem_id="map")
        with gradio.Column(scale=3, min_width=320):
            result = gradio.HTML(js_on_load=CLICK, elem_id="maps")

    def heat_map(*given: Any) -> str:
        return answer(desk.heat_map, *given)

    button.click(heat_map, [picture, texts], result, api_name="heat_map", show_progress="minimal")
