"""The search app over HTTP: the requests that its guard lets through, and the app's answers."""

import asyncio
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipfast.search.app_server import MAX_REQUEST, POLICY, UPLOAD, Guard, check_port, serving

from .conftest import COLOURS, FOLDER, png_of_size, rows

HOME = "127.0.0.1:7860"


def guarded(path, uploads, method="GET", **headers):
    """Return status and headers of the search app's guard for a request; the app behind it serves every request."""
    sent = []
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in ({"host": HOME} | headers).items()]

    async def everything(scope, receive, send):
        """Answer every request, as the search app behind the guard does."""
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        """Record a part of the answer to a request to the search app."""
        sent.append(message)

    guard = Guard(everything, uploads)
    asyncio.run(guard({"type": "http", "path": path, "method": method, "headers": given}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_guard_serves_uploads_alone(tmp_path):
    uploads, outside = tmp_path / "uploads", tmp_path / "outside.png"
    uploads.mkdir()
    outside.touch()
    (uploads / "a.png").touch()
    (uploads / "link.png").symlink_to(outside)
    assert guarded(f"/gradio_api/file={uploads}/a.png", uploads)[0] == 200
    for file in ("/etc/passwd", outside, f"{uploads}/link.png", f"{uploads}/../outside.png", "http://a.b/c", "a\0", ""):
        for prefix in ("/file=", "/file/", "/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy="):
            assert guarded(f"{prefix}{file}", uploads)[0] == 403, (prefix, file)
    # The request follows a link from another site to the page.
    status, headers = guarded("/", uploads, sec_fetch_site="cross-site")
    assert (status, headers[b"content-security-policy"]) == (200, POLICY.encode())


def test_only_its_own_page_and_programs_may_ask(tmp_path):
    call = "/gradio_api/call/search"
    for status, path, headers in (
        (200, UPLOAD, {"content_length": str(MAX_REQUEST + 1)}),
        (403, call, {"content_length": str(MAX_REQUEST + 1)}),
        (403, call, {"content_length": ""}),
        (403, "/gradio_api/process_recording", {}),
        (200, call, {"origin": f"http://{HOME}", "sec_fetch_site": "same-origin"}),
        (200, call, {}),  # a program, unlike a browser, sends no origin
        (403, call, {"origin": "http://evil.example"}),
        (403, call, {"origin": "null"}),
        (403, call, {"origin": f"http://{HOME}1"}),  # the origin is another port of this machine
        (403, call, {"sec_fetch_site": "same-site"}),
        (403, "/config", {"sec_fetch_site": "cross-site"}),
    ):
        assert guarded(path, tmp_path, "POST", **{"content_length": "1"} | headers)[0] == status, (path, headers)
    assert guarded(UPLOAD, tmp_path, "DELETE")[0] == 403


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is in use"):
            check_port(port)


def free_port():
    """Return a port that is free for the search app."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# CI does not install Gradio, which takes 30 s and 250 MB: the tests below run where it is installed.
@pytest.fixture(scope="module")
def served(desk):
    """Serve the search app, and yield its port."""
    pytest.importorskip("gradio")
    port = free_port()
    with serving(desk, "<h1>title</h1>", port):
        yield port


def ask(port, path, *, method="GET", body=None, headers=None):
    """Send a request to the search app, and return its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    # http.client sends the path as it is, and does not normalise it.
    connection.request(method, path, body, headers or {})
    answered = connection.getresponse()
    found = answered.status, answered.read()
    connection.close()
    return found


def call(port, name, *data):
    """Call a function of the search app as a browser does, by two requests, and return its answer."""
    body = json.dumps({"data": data})
    status, told = ask(
        port, f"/gradio_api/call/{name}", method="POST", body=body, headers={"Content-Type": "application/json"}
    )
    assert status == 200, told
    status, events = ask(port, f"/gradio_api/call/{name}/{json.loads(told)['event_id']}")
    assert events.startswith(b"event: complete"), events
    return json.loads(events.split(b"data: ")[1])[0]


def upload(port, content):
    """Upload a picture to the search app, and return the description by which requests name it."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, told = ask(port, "/gradio_api/upload", method="POST", body=body, headers=headers)
    assert status == 200
    return {"path": json.loads(told)[0], "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


def test_it_answers_over_http(served, desk):
    assert call(served, "search", "red", None, 0.5, "", 3) == desk.search("red", None, 0.5, "", 3)
    assert 'role="alert"' in call(served, "search", "red", None, 0.5, "nonsense", 3)
    stream = io.BytesIO()
    Image.new("RGB", (40, 33), COLOURS[3]).save(stream, "PNG")
    picture = upload(served, stream.getvalue())
    assert rows(call(served, "search", "", picture, 0.5, "height < 50", 1)) == [3]
    assert "<table" in call(served, "classify", picture, "red\nblue", "plain")
    assert call(served, "heat_map", picture, "red\nblue") == desk.heat_map(picture["path"], "red\nblue")
    assert "drop a picture" in call(served, "heat_map", None, "red")
    assert ask(served, f"/gradio_api/file={picture['path']}") == (200, stream.getvalue())
    for content, expected in ((b"no picture", "not an image"), (png_of_size(60_000, 60_000), "size")):
        assert expected in call(served, "search", "", upload(served, content), 0.5, "", 3)


def test_nothing_else_is_served(served, folder):
    outside, link = folder / "outside.png", folder / FOLDER / "link.png"
    attempts = [
        "/file=../../etc/passwd", f"/gradio_api/file={outside}", "/gradio_api/file=..%2F..%2Fetc%2Fpasswd",
        f"/gradio_api/file={link}".replace(" ", "%20").replace('"', "%22"), "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/proxy=http://127.0.0.1:1/x", "/static/../../../../../../etc/passwd", "/../../etc/passwd",
        f"/gradio_api/file={folder / 'embedded' / 'about.json'}",
    ]  # fmt: skip
    for path in attempts:
        status, found = ask(served, path)
        assert status in (400, 403, 404), (path, status)
        assert b"root:" not in found
        assert outside.read_bytes() not in found


@pytest.mark.parametrize("name", ["search", "classify", "heat_map"])
def test_a_file_that_was_not_uploaded_is_not_looked_at(name, served, folder):
    """The search app reads only uploaded pictures: for other paths and addresses, answers do not tell what is there."""
    address, headers = f"/gradio_api/call/{name}", {"Content-Type": "application/json"}
    paths = [folder / "outside.png", folder / "nothing.png", "setup.py", f"http://127.0.0.1:{served}/x.png", "a\0"]
    # Given ``meta``, Gradio itself refuses files, and clipfast refuses addresses, so there are two answers.
    for meta, answers in (({}, 1), ({"meta": {"_type": "gradio.FileData"}}, 2)):
        told = set()
        for path in paths:
            given = {"path": str(path), **meta}
            data = {"search": ["", given, 0.5, "", 3], "classify": [given, "a", "plain"], "heat_map": [given, "a"]}
            _, begun = ask(served, address, method="POST", body=json.dumps({"data": data[name]}), headers=headers)
            told.add(ask(served, f"{address}/{json.loads(begun)['event_id']}")[1])
        assert all(events.startswith(b"event: error") for events in told)
        assert len(told) <= answers


def test_only_this_machine_by_its_own_name(served):
    assert ask(served, "/")[0] == 200
    assert ask(served, "/", headers={"Host": "evil.example"})[0] == 400
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", served)) == 0
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", served)) != 0  # the server listens on 127.0.0.1 only


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number, folder, embeddings, tmp_path):
    pytest.importorskip("gradio")
    arguments = ["app", str(folder / "embedded"), "--no-browser", "--pictures", str(folder / FOLDER)]
    command = [sys.executable, "-m", "clipfast", *arguments, "--port", str(free_port())]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as app:
        assert "searches 9 items" in app.stdout.readline()
        app.send_signal(number)
        _, errors = app.communicate(timeout=60)
    assert (app.returncode, errors) == (0, "")
    assert not list(Path(tmp_path).glob("clipfast-app-*"))
