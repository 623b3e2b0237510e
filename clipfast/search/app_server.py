"""The Gradio page of ``clipfast app``, and its server, which only this machine can reach."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..evaluate.results import DEFAULT_TEMPLATES
from ..evaluate.zero_shot import TEMPLATES
from .app import FOUND, MAX_MAPS, Desk, answer

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # no other host name is allowed, since a site's name may resolve to HOST (DNS rebinding)
FILES = ("file=", "file/", "proxy=")  # the prefixes of the URL paths under which Gradio serves files
MAX_UPLOAD, MAX_REQUEST = 50 * 2**20, 2**20  # the largest upload, and the largest other request, in bytes
UPLOAD = "/gradio_api/upload"
POSTED = (UPLOAD, "/gradio_api/call/", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
KEPT = 3600  # uploads are removed after this many seconds
SESSIONS = 16  # number of sessions whose state Gradio keeps, 100 KB each; few suffice, as the state is always the same
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
SAID = {"common.complete": "done"}  # without this text, screen readers would say the key itself after each answer
# JavaScript that folds the search options on a narrow screen, so that results are visible without scrolling far.
NARROW = "() => { if (innerWidth < 640) document.querySelector('#more button')?.click() }"
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware that passes only requests of the app's own page to Gradio, and none for files but uploads.

    Without it, a page of another origin could send requests to this machine, though it could not read the answers.

    Args:
        app: Gradio's ASGI application, to which accepted requests pass.
        uploads: the folder of uploaded pictures.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], uploads: Path) -> None:
        self.app, self.uploads = app, uploads.resolve()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass an ASGI request on to Gradio, or answer it with status 403."""
        if scope["type"] == "http" and not self._may_ask(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not served\n"})
            return

        async def answer(message: Message) -> None:
            """Send a message of Gradio's answer, with security headers added."""
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, receive, answer)

    def _may_ask(self, scope: Message) -> bool:
        """Return whether a request to the app is allowed.

        An allowed request comes from the app's own page, from a link to the page, or from a program. It asks for no
        file except uploads, and posts only to the paths that the page uses.
        """
        given, path = dict(scope["headers"]), scope["path"]
        own = b"http://" + given.get(b"host", b"")
        # A link on another site may open the page, "/", and nothing else.
        is_own = given.get(b"sec-fetch-site", b"none") in (b"same-origin", b"none") or path == "/"
        if not is_own or given.get(b"origin", own) != own or not self._allows(path):
            return False
        if scope["method"] != "POST":
            return scope["method"] in ("GET", "HEAD")
        length = given.get(b"content-length", b"")
        return path.startswith(POSTED) and (path == UPLOAD or (length.isdigit() and int(length) <= MAX_REQUEST))

    def _allows(self, path: str) -> bool:
        """Return False if a URL path asks Gradio for a file that was not uploaded to the app."""
        for mark in FILES:
            _, found, file = path.partition(f"/{mark}")
            if found:
                try:
                    return Path(file).resolve().is_relative_to(self.uploads)
                except (OSError, ValueError):  # no file can have this name, such as one with a NUL
                    return False
        return True


def check_port(port: int) -> None:
    """Raise ValueError if the app cannot listen on a port of this machine.

    Raises:
        ValueError: this user may not use the port, or it is in use.
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
    """Serve the app's page while the context is open, and yield the address (URL) of the page.

    Args:
        desk: the functions that answer requests.
        title: the HTML at the top of the page; text in it must be escaped already.
        port: the port to listen on.
        browser: whether to open the page in the user's browser.
    """
    with tempfile.TemporaryDirectory(prefix="clipfast-app-") as folder:
        # These variables are set before the import, since Gradio reads them when it is imported or makes a page.
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
    """Print the line ``said`` about the app's address, and wait for Ctrl-C or SIGTERM.

    A program that reads the line may send the signal at once, so the handler is set before the line is printed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        print(said, flush=True)
        threading.Event().wait()


def _page(desk: Desk, title: str, uploads: Path) -> Any:
    """Return the app's page as Gradio blocks; ``uploads`` is the folder of uploaded pictures."""
    import gradio

    labels = {"label": "Labels, one in each line", "lines": 6, "max_lines": 20}
    texts = {"label": "Texts, one in each line", "lines": 4, "max_lines": MAX_MAPS}
    with gradio.Blocks(title="clipfast app", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(title)
        with gradio.Tabs():
            with gradio.Tab("Search"):
                _search_tab(desk, uploads)
            with gradio.Tab("Classify"):
                _picture_tab(desk.classify, uploads, labels, "Classify", templates=[*TEMPLATES])
            with gradio.Tab("Heat maps"):
                _picture_tab(desk.heat_map, uploads, texts, "Show where they are")
        page.load(None, js=NARROW, api_visibility="private")
    return page


def _picture_field(uploads: Path, **options: Any) -> Any:
    """Return the app page's field for a picture; its value is the uploaded file, which only :class:`Desk` decodes."""
    import gradio

    def uploaded(path: str) -> str:
        """Return the path of a picture that the user uploaded to the app; for any other path, raise an error."""
        try:  # for a path outside of the uploads, the error does not tell whether the file exists
            file = Path(path).resolve()
            if file.is_relative_to(uploads) and file.is_file():
                return str(file)
        except (OSError, ValueError):  # raised for a name that no file can have
            pass
        raise gradio.Error("the picture is no longer there: drop it again", print_exception=False)

    async def moved(path: str) -> str:
        """Return the path of an uploaded picture; Gradio's own method would copy the file and return the copy."""
        return uploaded(path)

    field: Any = gradio.Image(type="filepath", sources=["upload", "clipboard"], height=220, **options)
    # These methods replace Gradio's own check of the uploaded file, which ignores payloads without "meta" and, before
    # it checks, downloads any URL in the payload. They are set on the instance, since for a subclass of a component
    # Gradio would write a file beside this module.
    field.async_move_resource_to_block_cache = moved
    field.preprocess = lambda payload: None if payload is None else uploaded(payload.path)
    return field


def _search_tab(desk: Desk, uploads: Path) -> None:
    """Add a tab to the app's page in which the user searches by words, a picture, or both."""
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
        """Return the HTML of the items that a search in the app finds, or of its error."""
        return answer(desk.search, *given)

    def show(event: gradio.EventData) -> str:
        """Return the HTML of the details of the item on which the user clicked in the app."""
        return answer(desk.detail, event.row)

    def similar(where: str, k: float, event: gradio.EventData) -> str:
        """Return the HTML of the items that are similar to the one whose details the app shows."""
        return answer(desk.similar, event.row, where, k)

    def sample(event: gradio.EventData) -> str:
        """Return the words of the example query on which the user clicked in the app."""
        return str(event.words)

    # Gradio evaluates annotations, which are text here, with the globals of the module. They lack the name "gradio",
    # since it is imported in this function, so the class itself is set as the annotation.
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


def _picture_tab(
    function: Callable[..., str], uploads: Path, lines: dict[str, Any], button: str, templates: Sequence[str] = ()
) -> None:
    """Add a tab to the app's page in which the user uploads a picture, writes lines of text, and may choose templates.

    Args:
        function: the method of :class:`Desk` that returns the result; its name is also that of Gradio's API endpoint.
        uploads: the folder of uploaded pictures.
        lines: the options of the text field, which is a ``gradio.Textbox``.
        button: the label of the button.
        templates: the names of the templates to choose from.
    """
    import gradio

    name = function.__name__
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            fields = [_picture_field(uploads, label="Picture"), gradio.Textbox(**lines)]
            if templates:
                fields.append(gradio.Dropdown(list(templates), value=DEFAULT_TEMPLATES, label="Templates"))
            asked = gradio.Button(button, variant="primary")
        with gradio.Column(scale=3, min_width=320):
            result = gradio.HTML(js_on_load=CLICK, elem_id=f"{name}-result")

    def ask(*given: Any) -> str:
        """Return the HTML that the tab's method of :class:`Desk` gives for the uploaded picture, or of its error."""
        return answer(function, *given)

    asked.click(ask, fields, result, api_name=name, show_progress="minimal")
