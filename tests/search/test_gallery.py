"""The page of found pictures: what it shows of hostile text, that it loads nothing, and how it works in a browser."""

import base64
import hashlib
import io
import urllib.parse
from html.parser import HTMLParser

import pytest
from PIL import Image

from clipfast.search.gallery import Item, gallery

EVIL = "<img onerror=alert(1)>.png"
SCRIPT = "</script><script>alert(2)</script>"
QUOTES = "\"quoted\" 'folder' &amp;"
VOID = {"meta", "img", "input"}


class Document(HTMLParser):
    """All elements of a page with their attributes and texts; every element must be closed in its order."""

    def __init__(self, path) -> None:
        super().__init__()
        self.elements, self.open = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, key="text", **attributes):
        """Return the values of ``key`` in all elements with these attributes."""
        wanted = {"tag": tag, **attributes}.items()
        return [one[key] for one in self.elements if wanted <= one.items() and key in one]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page whose every text is hostile, beside the folder of its pictures, and the size that is returned."""
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
    return Document(page[0])


def test_text_is_shown_as_it_is_and_a_link_leads_to_a_file_only(page, document):
    cat = f"<b>cat</b>{SCRIPT}"
    assert document.all("h1") == document.all("title") == [f"Found <b>{QUOTES}"]
    assert document.all("p")[0] == SCRIPT
    assert document.all("span", **{"class": "caption"}) == [cat, "dog", "bird"]
    assert document.all("span", **{"class": "name"}) == [QUOTES]
    assert document.all("span", **{"class": "mark"}) == ["<b>"]
    names = ["path", "<i>", "path", "width", "ratio", "path", "width", "width", "list"]
    path = str(page[0].parent / QUOTES / EVIL)
    values = [path, SCRIPT, "javascript:<b>(3)", "9", "0.333333", "caf?.png", "10", "100", "['a', '<b>']"]
    assert (document.all("dt"), document.all("dd")) == (names, values)
    assert document.all("b", "data-value") == ["0.25", "0.123456789", "-0.5"]
    assert document.all("img", "alt") == [cat, "dog"]
    columns = ["score", "caption", "path", "<i>", "width", "ratio", "list"]
    assert document.all("option") == ["order given", *columns, "ascending", "descending"]
    (address,) = document.all("a", "href")
    assert ":" not in address
    assert urllib.parse.unquote(address) == f"{QUOTES}/{EVIL}"


def test_nothing_is_loaded_and_one_script_runs(page, document):
    (policy,) = document.all("meta", "content", **{"http-equiv": "Content-Security-Policy"})
    (script,) = document.all("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; ")
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "alert" not in script
    assert not any(name.startswith("on") for one in document.elements for name in one)
    assert all(address.startswith("data:image/jpeg;base64,") for address in document.all("img", "src"))
    assert not document.all("link") + document.all("form")
    assert "://" not in page[0].read_text()


def test_thumbnails_are_small_and_the_size_of_the_file_is_returned(page, document):
    assert page[1] == page[0].stat().st_size
    sizes = []
    for address in document.all("img", "src", decoding="async", loading="lazy"):
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
            sizes.append(image.size)
    assert sizes == [(256, 64), (8, 8)]
    broken, none = document.all("button", **{"class": "open"})[2:]
    assert broken.startswith("not an image")
    assert none == "no picture"


def test_a_failing_item_leaves_the_old_page(tmp_path):
    (tmp_path / "p.html").write_text("old")

    def items():
        yield Item(None, "one")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        gallery(tmp_path / "p.html", "new", items())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
