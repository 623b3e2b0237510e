"""The gallery, an HTML page of found pictures: it escapes hostile text, loads nothing, and works in a browser."""

import base64
import hashlib
import io
import re
import urllib.parse
from html.parser import HTMLParser

import pytest
from PIL import Image

from clipfast.search.gallery import Item, gallery

EVIL = "<img onerror=alert(1)>.png"
SCRIPT = "</script><script>alert(2)</script>"
QUOTES = "\"quoted\" 'folder' &amp;"


class Document(HTMLParser):
    """The parsed gallery page: its elements, as pairs of a tag and its attributes, and its text."""

    def __init__(self, path) -> None:
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Record an element of a page of the gallery."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        """Record the text of a page of the gallery."""
        self.text += data

    def all(self, tag, key):
        """Return the values of the attribute ``key`` in the gallery's elements ``tag``, where they have it."""
        return [attributes[key] for name, attributes in self.elements if name == tag and key in attributes]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Write a gallery page whose every text is hostile, and return its path and the size that was reported."""
    path = tmp_path_factory.mktemp("pages") / "page.html"
    pictures = path.parent / QUOTES
    pictures.mkdir()
    Image.new("RGB", (400, 100), "red").save(pictures / EVIL)
    (pictures / "broken.png").write_bytes(b"<b>")
    cat = pictures / EVIL
    items = [
        Item(cat, f"<b>cat</b>{SCRIPT}", 0.25, str(cat), metadata={"<i>": SCRIPT, "none": None}),
        Item(
            Image.new("L", (8, 8)), "dog", 0.123456789, "javascript:<b>(3)", QUOTES, {"width": 9, "ratio": 1 / 3}, "<b>"
        ),
        Item(pictures / "broken.png", "bird", -0.5, "caf\udce9.png", QUOTES, {"width": 10}),
        Item(None, "", None, "", QUOTES, {"width": 100, "list": ["a", "<b>"]}),
    ]
    return path, gallery(path, f"Found <b>{QUOTES}", iter(items), about=SCRIPT)


@pytest.fixture(scope="module")
def document(page):
    """Return the parsed page of the gallery."""
    return Document(page[0])


def test_text_is_shown_as_it_is_and_a_link_leads_to_a_file_only(page, document):
    cat = f"<b>cat</b>{SCRIPT}"
    shown = (f"Found <b>{QUOTES}", SCRIPT, cat, str(page[0].parent / QUOTES / EVIL), "javascript:<b>(3)", "caf?.png")
    for text in (*shown, "0.333333", "['a', '<b>']", "not an image", "no picture"):
        assert text in document.text
    assert not {"i"} & {tag for tag, _ in document.elements}
    assert document.all("b", "data-value") == ["0.25", "0.123456789", "-0.5"]
    assert document.all("img", "alt") == [cat, "dog"]
    assert document.all("option", "value")[1:8] == ["score", "caption", "path", "<i>", "width", "ratio", "list"]
    (address,) = document.all("a", "href")
    assert ":" not in address
    assert urllib.parse.unquote(address) == f"{QUOTES}/{EVIL}"


def test_nothing_is_loaded_and_one_script_runs(page, document):
    (policy,) = (own["content"] for _, own in document.elements if "http-equiv" in own)
    (script,) = re.findall("<script>(.*?)</script>", page[0].read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; ")
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert not any(name.startswith("on") for _, own in document.elements for name in own)
    assert [tag for tag, own in document.elements if "src" in own] == ["img"] * 2
    assert "://" not in page[0].read_text()


def test_thumbnails_are_small_and_the_size_of_the_file_is_returned(page, document):
    assert page[1] == page[0].stat().st_size
    shown = [address.removeprefix("data:image/jpeg;base64,") for address in document.all("img", "src")]
    assert [Image.open(io.BytesIO(base64.b64decode(one))).size for one in shown] == [(256, 64), (8, 8)]
