"""The page of found pictures: what it shows of hostile text, that it loads nothing, and how it works in a browser."""

import base64
import hashlib
import io
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
        """What elements with these attributes have at ``key``, if they have it."""
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
    assert list(zip(document.all("dt"), document.all("dd"), strict=True)) == [
        ("path", str(page[0].parent / QUOTES / EVIL)),
        ("<i>", SCRIPT),
        ("path", "javascript:<b>(3)"),
        ("width", "9"),
        ("ratio", "0.333333"),
        ("path", "caf?.png"),
        ("width", "10"),
        ("width", "100"),
        ("list", "['a', '<b>']"),
    ]
    assert document.all("b", **{"class": "score"}) == ["0.2500", "0.1235", "-0.5000"]
    assert document.all("b", "data-value") == ["0.25", "0.123456789", "-0.5"]
    assert document.all("dd", "data-value") == [repr(1 / 3)]
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


def test_a_page_of_nothing(tmp_path):
    gallery(tmp_path / "p.html", "nothing", [])
    document = Document(tmp_path / "p.html")
    assert document.all("p")[0] == "No pictures."
    assert not document.all("section")
    assert not document.all("input", id="least")


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
    """A browser with the screen of a phone."""
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
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    yield opened
    opened.quit()


SHOWN = "return [...document.querySelectorAll('.card')].filter(x => x.checkVisibility()).map(x => x.textContent)"


def test_in_a_browser(browser, page):
    """Sorted, filtered and looked at by keyboard, on a phone: nothing of the texts runs, and nothing is an error."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.get(page[0].as_uri())
    run, element = browser.execute_script, browser.find_element
    widths = "return [document.documentElement.scrollWidth, innerWidth, document.querySelectorAll('script').length]"
    assert run(widths) == [390, 390, 1]

    def shown():
        words = {"cat": "cat", "dog": "dog", "bird": "bird", "no picture": "none"}
        return [next(words[word] for word in words if word in text) for text in run(SHOWN)]

    def keys(*some):
        ActionChains(browser).send_keys(*some).perform()

    every = ["cat", "dog", "bird", "none"]
    assert shown() == every
    assert not element("id", "way").is_enabled()  # the order given has no direction
    for column, way, order in (
        ("score", "descending", every),
        ("width", "descending", ["cat", "none", "bird", "dog"]),
        ("score", "ascending", ["cat", "bird", "dog", "none"]),
        ("width", "ascending", every),
    ):
        element("id", "column").send_keys(column)
        # first the way that one looks for
        assert element("id", "way").get_attribute("value") == ("down" if column == "score" else "up")
        element("id", "way").send_keys(way)
        assert shown() == order, (column, way)
    for name, text, order in (
        ("least", "0", ["cat", "dog"]),
        ("most", "0.2", ["dog"]),
        ("least", "", ["dog", "bird"]),
        ("most", "", every),
        ("words", "onerror <B>CAT", ["cat"]),
        ("words", "nowhere", []),
        ("words", "quoted 10", ["bird", "none"]),
        ("words", "quoted", every),
    ):
        element("id", name).send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)
        assert shown() == order, (name, text)
        assert element("id", "count").text == f"{len(order)} of 4 shown"
        assert element("id", "none").is_displayed() == (not order)
    element("css selector", ".open").send_keys(Keys.ENTER)
    content = element("id", "content")
    assert all(text in content.text for text in (f"<b>cat</b>{SCRIPT}", QUOTES, EVIL))
    assert content.find_element("tag name", "img").size["width"] > 300
    keys(Keys.ARROW_RIGHT)
    assert content.text.startswith("0.1235 <b> dog")
    keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert "cat" in content.text
    keys(Keys.ARROW_RIGHT, Keys.ESCAPE)
    assert not element("id", "larger").is_displayed()
    assert run("return document.activeElement.closest('.card').querySelector('.caption').textContent") == "dog"
    assert browser.get_log("browser") == []


def test_large_thumbnails_and_a_page_of_nothing_in_a_browser(browser, tmp_path):
    path, widths = tmp_path / "p.html", []
    for side in (256, 512):
        gallery(path, "large", [Item(Image.new("RGB", (600, 600)))] * 2, side=side)
        browser.get(path.as_uri())
        widths.append(browser.find_element("tag name", "img").size["width"])
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert widths[0] < 200 < 300 < widths[1]
    gallery(path, "nothing", [])
    browser.get(path.as_uri())
    assert not any(browser.find_element("id", name).is_displayed() for name in ("controls", "none"))
    assert browser.get_log("browser") == []
