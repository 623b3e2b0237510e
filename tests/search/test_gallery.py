"""The page of found pictures: what it shows of hostile text, that it loads nothing, and how it works in a browser."""

import base64
import hashlib
import io
import re
import shutil
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

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        element = {"tag": tag, "attributes": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, kind=None):
        return [
            one
            for one in self.elements
            if one["tag"] == tag and (kind is None or one["attributes"].get("class") == kind)
        ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def page(folder):
    """A page whose every text is hostile, and its size."""
    pictures = folder / QUOTES
    pictures.mkdir()
    Image.new("RGB", (400, 100), "red").save(pictures / EVIL)
    (pictures / "broken.png").write_bytes(b"<b>")
    items = [
        Item(
            pictures / EVIL, f"<b>cat</b>{SCRIPT}", 0.25, str(pictures / EVIL), metadata={"<i>": SCRIPT, "none": None}
        ),
        Item(
            Image.new("L", (8, 8)), "dog", 0.123456789, "javascript:<b>(3)", QUOTES, {"width": 9, "ratio": 1 / 3}, "<b>"
        ),
        Item(pictures / "broken.png", "bird", -0.5, "caf\udce9.png", QUOTES, {"width": 10}),
        Item(None, "", None, "", QUOTES, {"width": 100, "list": ["a", "<b>"]}),
    ]
    path = folder / "page.html"
    return path, gallery(path, f"Found <b>{QUOTES}", iter(items), about=SCRIPT)


@pytest.fixture(scope="module")
def document(page):
    return Document(page[0].read_text(encoding="utf-8"))


def test_text_is_shown_as_it_is(folder, document):
    assert document.all("h1")[0]["text"] == document.all("title")[0]["text"] == f"Found <b>{QUOTES}"
    assert document.all("p")[0]["text"] == SCRIPT
    assert [one["text"] for one in document.all("span", "caption")] == [f"<b>cat</b>{SCRIPT}", "dog", "bird"]
    assert [one["text"] for one in document.all("span", "name")] == [QUOTES]
    assert [one["text"] for one in document.all("span", "n")] == ["3 shown"]
    assert [one["text"] for one in document.all("span", "mark")] == ["<b>"]
    names, values = ([one["text"] for one in document.all(tag)] for tag in ("dt", "dd"))
    assert names == ["path", "<i>", "path", "width", "ratio", "path", "width", "width", "list"]
    assert values[:2] == [str(folder / QUOTES / EVIL), SCRIPT]
    assert values[2:] == ["javascript:<b>(3)", "9", "0.333333", "caf?.png", "10", "100", "['a', '<b>']"]
    assert [one["text"] for one in document.all("b", "score")] == ["0.2500", "0.1235", "-0.5000"]
    assert [one["attributes"]["data-value"] for one in document.all("b")] == ["0.25", "0.123456789", "-0.5"]
    assert [one["attributes"]["data-value"] for one in document.all("dd") if one["attributes"]] == [repr(1 / 3)]
    assert [one["attributes"]["alt"] for one in document.all("img")] == [f"<b>cat</b>{SCRIPT}", "dog"]
    options = [one["text"] for one in document.all("option")]
    assert options == [
        "order given", "score", "caption", "path", "<i>", "width", "ratio", "list", "ascending", "descending",
    ]  # fmt: skip


def test_nothing_is_loaded_and_one_script_runs(page, document):
    (policy,) = [one["attributes"]["content"] for one in document.all("meta") if "http-equiv" in one["attributes"]]
    (script,) = document.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; ")
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert {"alert", "EVIL"} & set(re.findall(r"\w+", script["text"])) == set()
    assert not any(name.startswith("on") for one in document.elements for name in one["attributes"])
    assert all(one["attributes"]["src"].startswith("data:image/jpeg;base64,") for one in document.all("img"))
    assert not document.all("link")
    assert not document.all("form")
    assert "://" not in page[0].read_text()


def test_thumbnails_are_small_and_the_size_of_the_file_is_returned(page, document):
    path, size = page
    assert size == path.stat().st_size
    sizes = []
    for one in document.all("img"):
        assert one["attributes"]["decoding"] == "async"
        assert one["attributes"]["loading"] == "lazy"
        with Image.open(io.BytesIO(base64.b64decode(one["attributes"]["src"].partition(",")[2]))) as image:
            sizes.append(image.size)
    assert sizes == [(256, 64), (8, 8)]
    assert [one["text"] for one in document.all("button", "open")][2:] == [
        "not an image in one of the formats JPEG, PNG, WEBP, GIF, BMP", "no picture",
    ]  # fmt: skip
    assert document.all("p")[1]["text"] == "4 pictures."


def test_a_link_leads_to_a_file_only(folder, document):
    (link,) = document.all("a")
    address = link["attributes"]["href"]
    assert ":" not in address
    assert urllib.parse.unquote(address) == f"{QUOTES}/{EVIL}"


def test_a_page_of_nothing(tmp_path):
    gallery(tmp_path / "p.html", "nothing", [])
    document = Document((tmp_path / "p.html").read_text())
    assert document.all("p")[0]["text"] == "No pictures."
    assert not document.all("section")
    assert "least" not in [one["attributes"].get("id") for one in document.all("input")]


def test_a_failing_item_leaves_the_old_page(tmp_path):
    (tmp_path / "p.html").write_text("old")

    def items():
        yield Item(None, "one")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        gallery(tmp_path / "p.html", "new", items())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for name in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(name)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield opened
    opened.quit()


SHOWN = "return [...document.querySelectorAll('.card')].filter(x => x.checkVisibility()).map(x => x.textContent)"


def test_in_a_browser(browser, page):
    """Sorted, filtered and looked at by keyboard, on a phone: nothing of the texts runs, and nothing is an error."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(page[0].as_uri())
    widths = "return [document.documentElement.scrollWidth, innerWidth, document.querySelectorAll('script').length]"
    assert browser.execute_script(widths) == [390, 390, 1]
    element = browser.find_element

    def shown():
        words = {"cat": "cat", "dog": "dog", "bird": "bird", "no picture": "none"}
        return [next(words[word] for word in words if word in text) for text in browser.execute_script(SHOWN)]

    def keys(*some):
        ActionChains(browser).send_keys(*some).perform()

    assert shown() == ["cat", "dog", "bird", "none"]
    assert not element("id", "way").is_enabled()  # the order given has no direction
    for column, way, order in (
        ("score", "descending", ["cat", "dog", "bird", "none"]),
        ("width", "descending", ["cat", "none", "bird", "dog"]),
        ("score", "ascending", ["cat", "bird", "dog", "none"]),
        ("width", "ascending", ["cat", "dog", "bird", "none"]),
    ):
        element("id", "column").send_keys(column)
        assert element("id", "way").get_attribute("value") == (
            "down" if column == "score" else "up"
        )  # what one looks for
        element("id", "way").send_keys(way)
        assert shown() == order, (column, way)
    for name, text, order in (
        ("least", "0", ["cat", "dog"]),
        ("most", "0.2", ["dog"]),
        ("least", "", ["dog", "bird"]),
        ("most", "", ["cat", "dog", "bird", "none"]),
        ("words", "onerror <B>CAT", ["cat"]),
        ("words", "nowhere", []),
        ("words", "quoted 10", ["bird", "none"]),
        ("words", "quoted", ["cat", "dog", "bird", "none"]),
    ):
        element("id", name).send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)
        assert shown() == order, (name, text)
        assert element("id", "count").text == f"{len(order)} of 4 shown"
        assert element("id", "none").is_displayed() == (not order)
    element("css selector", ".open").send_keys(Keys.ENTER)
    content = element("id", "content")
    assert f"<b>cat</b>{SCRIPT}" in content.text
    assert QUOTES in content.text
    assert EVIL in content.text
    assert content.find_element("tag name", "img").size["width"] > 300
    keys(Keys.ARROW_RIGHT)
    assert content.text.startswith("0.1235 <b> dog")
    keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert "cat" in content.text
    keys(Keys.ARROW_RIGHT, Keys.ESCAPE)
    assert not element("id", "larger").is_displayed()
    assert (
        browser.execute_script("return document.activeElement.closest('.card').querySelector('.caption').textContent")
        == "dog"
    )
    assert browser.get_log("browser") == []


def test_large_thumbnails_are_shown_large(browser, tmp_path):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    widths = []
    for side in (256, 512):
        gallery(tmp_path / "p.html", "large", [Item(Image.new("RGB", (600, 600)))] * 2, side=side)
        browser.get((tmp_path / "p.html").as_uri())
        widths.append(browser.find_element("tag name", "img").size["width"])
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert widths[0] < 200 < 300 < widths[1]


def test_a_page_of_nothing_in_a_browser(browser, tmp_path):
    gallery(tmp_path / "p.html", "nothing", [])
    browser.get((tmp_path / "p.html").as_uri())
    assert not browser.find_element("id", "controls").is_displayed()
    assert not browser.find_element("id", "none").is_displayed()
    assert browser.get_log("browser") == []
