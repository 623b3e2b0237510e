"""The app: what its functions answer, what the guard before it lets through, and the served page over HTTP."""

import asyncio
import html
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipfast import Embeddings, create_model
from clipfast.checkpoint import export_open_clip
from clipfast.cli import main
from clipfast.evaluation.encoder import Encoder
from clipfast.images import ImageError
from clipfast.search.app import MAX_FOUND, MAX_LABELS, MAX_TEXT, Desk, Pictures, answer
from clipfast.search.app_server import POLICY, Guard, check_port, serving
from clipfast.search.samples import Samples

EVIL = "<img onerror=alert(1)>.png"
CAPTION = "<b>bold</b> & 'single' \"double\""
FOLDER = 'it\'s "quoted" <i>'
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def png_of_size(width, height):
    """A PNG whose header names a size that its content does not have."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model; a folder of pictures, in which a link leads out of it; and a picture outside."""
    folder = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    export_open_clip(create_model("ViT-T-8-32"), folder / "model")
    (folder / FOLDER).mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 30 + number), colour).save(folder / FOLDER / (EVIL if number == 0 else f"{number}.png"))
    Image.new("RGB", (50, 50), "pink").save(folder / "outside.png")
    (folder / FOLDER / "link.png").symlink_to(folder / "outside.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.load(f"local-dir:{folder / 'model'}", device="cpu")


@pytest.fixture(scope="module")
def embeddings(folder, encoder):
    """Six pictures; three more rows name the outside by an absolute path, a link, and a path with dots."""
    names = [EVIL, *(f"{number}.png" for number in range(1, len(COLOURS)))]
    pixels = [encoder.transform(Image.open(folder / FOLDER / name)) for name in names]
    features = encoder.images(torch.stack([*pixels, *pixels[:3]]))
    outside = [str(folder / "outside.png"), str(folder / FOLDER / "link.png"), "../outside.png"]
    metadata = {
        "image_path": [str(folder / FOLDER / name) for name in names] + outside,
        "caption": [CAPTION, *COLOURS[1:], "outside", "outside", "outside"],
        "height": [30 + number for number in range(6)] + [50] * 3,
    }
    about = {**encoder.about(), "data": str(folder / FOLDER)}
    found = Embeddings(features, metadata, about=about)
    found.save(folder / "embedded")
    return found


@pytest.fixture(scope="module")
def desk(folder, encoder, embeddings):
    return Desk(embeddings, encoder, Pictures([folder / FOLDER]))


def rows(found):
    return [int(row) for row in re.findall(r'data-row="(\d+)"', found)]


def test_search_by_words_gives_the_items_of_an_exact_search(desk, encoder, embeddings):
    query = encoder.texts(["something red"])
    expected = embeddings.search(query, 4)
    found = desk.search("something red", None, 0.5, "", 4)
    assert rows(found) == expected.indices[0].tolist()
    assert re.findall(r"<b>(-?[\d.]+)</b>", found) == [f"{score:.4f}" for score in expected.scores[0]]


def test_a_picture_finds_itself_and_the_weight_mixes_it_with_words(desk, folder, encoder, embeddings):
    picture = str(folder / FOLDER / "3.png")
    assert rows(desk.search("", picture, 0.5, "height < 50", 1)) == [3]
    for weight, words in ((0, "x"), (1, ""), (0.3, "some words")):
        image = embeddings.features[3]
        text = encoder.texts([words or "x"])[0]
        mixed = torch.nn.functional.normalize(weight * text + (1 - weight) * image, dim=0)
        found = desk.search(words or "x", picture, weight, "", 9)
        assert rows(found) == embeddings.search(mixed, 9).indices[0].tolist()


def test_a_filter_limits_what_is_found(desk):
    assert set(rows(desk.search("x", None, 0.5, "height >= 32 and height < 35", 9))) == {2, 3, 4}
    assert "No item fulfils the filter" in desk.search("x", None, 0.5, "height > 1000", 9)


def test_similar_ones_of_an_item_start_with_itself(desk):
    assert rows(desk.similar(4, "height < 50", 3))[0] == 4


def test_all_text_is_shown_as_text(desk):
    found, detail = desk.search("x", None, 0.5, "height = 30", 9), desk.detail(0)
    for shown in (found, detail):
        assert html.escape(CAPTION) in shown
        assert CAPTION not in shown
        assert "<img onerror" not in shown
    assert html.escape(EVIL) in detail
    assert html.escape(FOLDER) in detail
    bad = answer(desk.search, "x", None, 0.5, f"{EVIL} = 1", 9)
    assert "<img" not in bad
    assert html.escape(EVIL[:4]) in bad
    assert "&lt;b&gt;" in desk.classify(str(desk.pictures.roots[0] / "1.png"), "<b>x</b>", "plain")


def test_pictures_outside_of_the_folders_are_not_shown(desk):
    shown = desk.search("x", None, 0.5, "caption = outside", 9)
    assert len(rows(shown)) == 3
    assert shown.count("no such file in the folders of pictures") == 3
    assert "<img" not in shown
    assert all("<img" not in desk.detail(row) for row in (6, 7, 8))
    assert "<img" in desk.detail(0)


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.png", "link.png", "1.png/../../outside.png", ".", "a\0b"])
def test_a_path_that_leads_out_is_refused(path, desk):
    with pytest.raises(ImageError):
        desk.pictures.open({"image_path": path})


def test_a_path_may_be_relative_to_a_folder_or_to_the_working_folder(desk, folder, monkeypatch):
    assert desk.pictures.open({"image_path": "2.png"}).size == (40, 32)
    monkeypatch.chdir(folder)
    assert desk.pictures.open({"image_path": f"{FOLDER}/2.png"}).size == (40, 32)
    with pytest.raises(ImageError, match="--pictures"):
        Pictures([]).open({"image_path": f"{FOLDER}/2.png"})


def write_table(folder, names):
    table = folder / "table.csv"
    table.write_text("filepath,title\n" + "".join(f"{name},a picture\n" for name in names))
    return table


def test_pictures_of_shards_and_tables_are_read_by_their_numbers(folder, tmp_path):
    Image.new("RGB", (20, 21), "red").save(tmp_path / "in.png")
    samples = Samples(str(write_table(tmp_path, ["in.png", folder / "outside.png"])))
    pictures = Pictures.of(samples.about())
    assert pictures.open({"number": 0}).size == (20, 21)
    for number in (1, 2, -1, None, "0"):  # 1 is a file that the table names outside of its folder
        with pytest.raises(ImageError):
            pictures.open({"number": number, "image_path": str(tmp_path / "in.png")})
    shards = Samples("bundled:emoji/fluent")
    assert Pictures.of(shards.about()).open({"number": 5}).tobytes() == shards.read(5).image.tobytes()


def test_a_source_that_cannot_be_used_is_refused(tmp_path):
    Image.new("RGB", (20, 21), "red").save(tmp_path / "in.png")
    about = Samples(str(write_table(tmp_path, ["in.png"]))).about()
    write_table(tmp_path, ["in.png", "in.png"])
    done = tmp_path / "done"
    for wrong, expected in (
        (about, "has changed"),
        ({}, "does not say"),
        ({"data": str(tmp_path / "gone.tar")}, "no such shard"),
        ({"data": f"pipe:touch {done}"}, "not on this machine"),
    ):
        with pytest.raises(ValueError, match=expected):
            Pictures.of(wrong)
    assert not done.exists()
    folder = tmp_path / "folder"
    folder.mkdir()
    assert Pictures.of({"data": str(folder)}).roots == [folder]


def test_labels_are_ranked_as_a_classifier_ranks_them(desk, folder, encoder):
    labels = ["red", "green", "blue"]
    image = encoder.images(encoder.transform(Image.open(folder / FOLDER / "1.png"))[None])
    similarities = (image @ encoder.classifier(labels, ("{}",)))[0]
    found = desk.classify(str(folder / FOLDER / "1.png"), "red\n\n green \nblue\nred", "plain")
    best = [labels[place] for place in similarities.argsort(descending=True).tolist()]
    assert re.findall(r'<th scope="row">(\w+)</th>', found) == best
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", found)) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(
    ("function", "given", "expected"),
    [
        ("search", (" ", None, 0.5, "", 9), "type some words"),
        ("search", ("x", None, 0.5, "heigth > 1", 9), "no column"),
        ("search", ("x", None, 0.5, "height >", 9), "a value is expected"),
        ("search", ("x" * (MAX_TEXT + 1), None, 0.5, "", 9), "at most"),
        ("search", ("x", None, 0.5, "", 0), "from 1 to"),
        ("search", ("x", None, 0.5, "", MAX_FOUND + 1), "from 1 to"),
        ("search", ("x", None, 0.5, "", 2.5), "from 1 to"),
        ("search", ("x", None, 0.5, "", float("nan")), "from 1 to"),
        ("search", ("x", None, 0.5, "", None), "from 1 to"),
        ("search", ("x", "1.png", 2, "", 9), "weight"),
        ("search", ("x", "1.png", None, "", 9), "weight"),
        ("search", ("", "broken.png", 0.5, "", 9), "not an image"),
        ("search", ("", "bomb.png", 0.5, "", 9), "size"),
        ("search", ("\ud800", "broken.png", 0.5, "", 9), 'role="alert"'),
        ("similar", (9, "", 9), "no item 9"),
        ("similar", (-1, "", 9), "no item -1"),
        ("detail", ("0",), "no item"),
        ("detail", (None,), "no item"),
        ("classify", (None, "a", "plain"), "drop a picture"),
        ("classify", ("1.png", " \n", "plain"), "1 to"),
        ("classify", ("1.png", "\n".join(map(str, range(MAX_LABELS + 1))), "plain"), "1 to"),
        ("classify", ("1.png", "a", "none"), "must be one of"),
        ("classify", ("gone.png", "a", "plain"), "gone.png"),
    ],
)
def test_an_error_is_a_message(function, given, expected, desk, folder):
    here = {"1.png": folder / FOLDER / "1.png", **{name: folder / name for name in ("broken.png", "bomb.png")}}
    found = answer(
        getattr(desk, function), *(str(here.get(value, value)) if value in here else value for value in given)
    )
    assert 'role="alert"' in found
    assert expected in found
    found.encode()


def test_what_nobody_foresaw_is_a_message_too(caplog):
    def fail():
        raise ZeroDivisionError("<b>")

    assert answer(fail) == '<p class="message" role="alert">this failed: &lt;b&gt;</p>'
    assert "ZeroDivisionError" in caplog.text


def test_features_that_do_not_fit_the_model_are_refused(encoder, embeddings):
    with pytest.raises(ValueError, match="7 wide"):
        Desk(Embeddings(torch.ones(2, 7)), encoder, Pictures([]))
    with pytest.raises(ValueError, match="no items"):
        Desk(Embeddings(embeddings.features[:0]), encoder, Pictures([]))


def test_captions_are_searched_where_there_are_no_images(encoder):
    texts = encoder.texts(["one", "two"])
    found = Desk(Embeddings(text_features=texts), encoder, Pictures([])).search("two", None, 0.5, "", 1)
    assert rows(found) == [1]
    assert "no picture" in found


def test_features_of_one_item(embeddings):
    joined = Embeddings(embeddings.features[:2])
    joined.append(embeddings.features[2:])
    assert joined.kinds == ("image",)
    assert all(torch.equal(joined.feature(row), embeddings.features[row]) for row in range(9))
    for number in (9, -1, True, "0"):
        with pytest.raises(ValueError, match="no item"):
            joined.feature(number)
    with pytest.raises(ValueError, match="no text features"):
        joined.feature(0, "text")


def guarded(path, uploads):
    """The status and the headers of the answer to a request, behind which is an app that serves everything."""
    sent = []

    async def everything(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(everything, uploads)({"type": "http", "path": path}, None, send))
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
    status, headers = guarded("/", uploads)
    assert (status, headers[b"content-security-policy"]) == (200, POLICY.encode())


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_bad_port_is_refused(port, capsys):
    assert main(["app", "nowhere", "--port", str(port)]) == 2
    assert "--port must be from 1 to 65535" in capsys.readouterr().err


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is in use"):
            check_port(port)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# CI does not install Gradio, which takes 30 s and 250 MB: what follows runs where it is installed.
@pytest.fixture(scope="module")
def served(desk):
    """The port of the served page."""
    pytest.importorskip("gradio")
    port = free_port()
    with serving(desk, "<h1>title</h1>", port):
        yield port


def ask(port, path, *, method="GET", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {})  # as it is: nothing in the path is tidied
    answered = connection.getresponse()
    found = answered.status, answered.read()
    connection.close()
    return found


def call(port, name, *data):
    """Ask a function of the page, as its browser does, and return its answer."""
    body = json.dumps({"data": data})
    status, told = ask(
        port, f"/gradio_api/call/{name}", method="POST", body=body, headers={"Content-Type": "application/json"}
    )
    assert status == 200, told
    status, events = ask(port, f"/gradio_api/call/{name}/{json.loads(told)['event_id']}")
    assert events.startswith(b"event: complete"), events
    return json.loads(events.split(b"data: ")[1])[0]


def upload(port, content):
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
    assert ask(served, f"/gradio_api/file={picture['path']}") == (200, stream.getvalue())
    for content, expected in ((b"no picture", "not an image"), (png_of_size(60_000, 60_000), "size")):
        assert expected in call(served, "search", "", upload(served, content), 0.5, "", 3)


def test_nothing_else_is_served(served, folder):
    outside, link = folder / "outside.png", folder / FOLDER / "link.png"
    attempts = [
        "/file=../../etc/passwd", "/gradio_api/file=../../../../../../etc/passwd", "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={outside}", f"/gradio_api/file={link}".replace(" ", "%20").replace('"', "%22"),
        "/gradio_api/file=%2Fetc%2Fpasswd", "/gradio_api/file%3D%2Fetc%2Fpasswd",
        "/gradio_api/file=..%2F..%2Fetc%2Fpasswd",
        "/gradio_api/file/etc/passwd", "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/static/../../../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd", "/../../etc/passwd",
        f"/gradio_api/file={folder / 'embedded' / 'about.json'}",
    ]  # fmt: skip
    for path in attempts:
        status, found = ask(served, path)
        assert status in (400, 403, 404), (path, status)
        assert b"root:" not in found
        assert outside.read_bytes() not in found


def test_a_file_that_was_not_uploaded_is_not_looked_at(served, folder):
    given = {"path": str(folder / "outside.png"), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": ["", given, 0.5, "", 3]})
    _, told = ask(
        served, "/gradio_api/call/search", method="POST", body=body, headers={"Content-Type": "application/json"}
    )
    _, events = ask(served, f"/gradio_api/call/search/{json.loads(told)['event_id']}")
    assert events.startswith(b"event: error")


def test_only_this_machine_by_its_own_name(served):
    assert ask(served, "/")[0] == 200
    assert ask(served, "/", headers={"Host": "evil.example"})[0] == 400
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", served)) == 0
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", served)) != 0  # as it would be if it listened on all addresses


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number, folder, embeddings, tmp_path):
    pytest.importorskip("gradio")
    arguments = ["app", str(folder / "embedded"), "--no-browser"]
    command = [sys.executable, "-m", "clipfast", *arguments, "--port", str(free_port())]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as app:
        assert "searches 9 items" in app.stdout.readline()
        app.send_signal(number)
        _, errors = app.communicate(timeout=60)
    assert (app.returncode, errors) == (0, "")
    assert not list(Path(tmp_path).glob("clipfast-app-*"))
