"""The search app: the answers of its functions to searches, classifications and requests for heat maps."""

import html
import re

import pytest
import torch
from PIL import Image, ImageOps

from clipfast import Embeddings
from clipfast.data.drawn_shapes import held_out_scene
from clipfast.io.page import thumbnail
from clipfast.models.images import ImageError
from clipfast.search.app import MAP_SIDE, MAX_FOUND, MAX_LABELS, MAX_MAPS, MAX_RATIO, MAX_TEXT, Desk, Pictures, answer
from clipfast.search.heatmap import heat_maps, limits_of, overlay, to_tensor
from clipfast.search.similar import probabilities
from clipfast.search.source_samples import Samples

from .conftest import CAPTION, EVIL, FOLDER, rows


def words_alone(desk, where="", k=9):
    """Search the embedded folder by words, without a picture."""
    return desk.search("x", None, 0.5, where, k)


def test_a_picture_finds_itself_and_the_weight_mixes_it_with_words(desk, folder, encoder, embeddings):
    picture, image, text = str(folder / FOLDER / "3.png"), embeddings.features[3], encoder.texts(["some words"])[0]
    assert rows(desk.search("", picture, 0.5, "height < 50", 1)) == [3]
    for weight in (1, 0, 0.3):
        mixed = torch.nn.functional.normalize(weight * image + (1 - weight) * text, dim=0)
        found, expected = desk.search("some words", picture, weight, "", 9), embeddings.search(mixed, 9)
        assert rows(found) == expected.indices[0].tolist()
        assert re.findall(r"<b>(-?[\d.]+)</b>", found) == [f"{score:.4f}" for score in expected.scores[0]]


def test_a_filter_limits_what_is_found(desk):
    assert set(rows(words_alone(desk, "height >= 32 and height < 35"))) == {2, 3, 4}
    assert "No item fulfils the filter" in words_alone(desk, "height > 1000")


def test_similar_ones_of_an_item_are_others(desk, embeddings):
    best = [row for row in embeddings.search(embeddings.features[4], 9).indices[0].tolist() if row not in (4, 6, 7, 8)]
    assert rows(desk.similar(4, "height < 50", 9)) == best


def test_it_starts_with_pictures_and_with_queries_that_find_what_they_say(desk, encoder):
    assert rows(desk.start()) == list(range(9))
    texts = encoder.texts(["one", "two", "three"])
    captions = {"caption": ["one", "<b>", "three"]}  # the caption "<b>" is false: the embedded text is "two"
    for metadata, expected in ((captions, ["one", "three"]), (None, [])):
        known = Desk(Embeddings(texts, metadata), encoder, Pictures([])).samples()
        assert re.findall('data-words="(.*?)"', known) == expected


def test_all_text_is_shown_as_text(desk):
    found, detail = words_alone(desk, "height = 30"), desk.detail(0)
    for shown in (found, detail):
        assert html.escape(CAPTION) in shown
        assert CAPTION not in shown
        assert "<img onerror" not in shown
    assert all(html.escape(name) in detail for name in (EVIL, FOLDER))
    bad = answer(desk.search, "x", None, 0.5, f"{EVIL} = 1", 9)
    assert "<img" not in bad
    assert html.escape(EVIL[:4]) in bad
    assert "&lt;b&gt;" in desk.classify(str(desk.pictures.roots[0] / "1.png"), "<b>x</b>", "plain")


def test_pictures_outside_of_the_folders_are_not_shown(desk):
    shown = words_alone(desk, "caption = outside")
    assert len(rows(shown)) == shown.count("no such file in the folders of pictures") == 3
    assert [row for row in (0, 6, 7, 8) if "<img" in desk.detail(row)] == [0]
    assert "<img" not in shown
    for path in ("/etc/passwd", "../outside.png", "link.png", "1.png/../../outside.png", ".", "a\0b"):
        with pytest.raises(ImageError):
            desk.pictures.open({"image_path": path})


def test_a_path_may_be_relative_to_a_folder_or_to_the_working_folder(desk, folder, monkeypatch):
    assert desk.pictures.open({"image_path": "2.png"}).size == (40, 32)
    monkeypatch.chdir(folder)
    assert desk.pictures.open({"image_path": f"{FOLDER}/2.png"}).size == (40, 32)
    with pytest.raises(ImageError, match="--pictures"):
        Pictures([]).open({"image_path": f"{FOLDER}/2.png"})


def test_pictures_of_the_source_are_read_by_their_numbers(tmp_path):
    Image.new("RGB", (20, 21), "red").save(tmp_path / "in.png")
    about, done = Samples(str(tmp_path)).about(), tmp_path / "done"
    pictures = Pictures.of(about)
    assert pictures.open({"number": 0}).size == (20, 21)
    for number in (1, -1, None, "0"):
        with pytest.raises(ImageError):
            pictures.open({"number": number})
    Image.new("RGB", (20, 21), "red").save(tmp_path / "more.png")
    for wrong, expected in ((about, "has changed"), (about | {"data": f"pipe:touch {done}"}, "not on this machine")):
        with pytest.raises(ValueError, match=expected):
            Pictures.of(wrong)
    assert not done.exists()


def test_labels_are_ranked_as_a_classifier_ranks_them(desk, folder, encoder):
    labels, picture = ["red", "green", "blue"], folder / FOLDER / "1.png"
    image = encoder.images(encoder.transform(Image.open(picture))[None])
    shares = probabilities(encoder, image, encoder.classifier(labels, ("{}",)))[0].tolist()
    found = desk.classify(str(picture), "red\n\n green \nblue\nred", "plain")
    rows = [(label, f"{share:.1%}") for share, label in sorted(zip(shares, labels, strict=True), reverse=True)]
    assert re.findall(r'<th scope="row">(\w+)</th>.*?([\d.]+%)', found) == rows


@pytest.mark.parametrize(
    ("function", "expected", "given"),
    [
        ("search", "type some words", {"words": " "}),
        ("search", "cannot be read", {"where": "height >"}),
        ("search", "at most", {"words": "x" * (MAX_TEXT + 1)}),
        *(("search", "from 1 to", {"k": k}) for k in (0, MAX_FOUND + 1, 2.5, None)),
        ("search", "weight", {"picture": f"{FOLDER}/1.png", "weight": 2}),
        ("search", "not an image", {"words": "", "picture": "broken.png"}),
        ("search", "size", {"words": "", "picture": "bomb.png"}),
        ("search", 'role="alert"', {"words": "\ud800", "picture": "broken.png"}),
        ("similar", "no item 9", {"row": 9}),
        ("classify", "drop a picture", {"picture": None}),
        ("classify", "at most", {"labels": "x" * (MAX_TEXT + 1)}),
        ("classify", "1 to", {"labels": "\n".join(map(str, range(MAX_LABELS + 1)))}),
        ("classify", "must be one of", {"templates": "none"}),
        ("classify", "gone.png", {"picture": "gone.png"}),
        ("heat_map", "there are 0", {"texts": None}),
        ("heat_map", f"1 to {MAX_MAPS} texts", {"texts": "\n".join(map(str, range(MAX_MAPS + 1)))}),
        ("heat_map", f"at most {MAX_RATIO} times the other one, got 51 x 10", {"picture": "long.png"}),
    ],
)
def test_an_error_is_a_message(function, expected, given, desk, folder, caplog):
    Image.new("RGB", (10 * MAX_RATIO + 1, 10)).save(folder / "long.png")
    usual = {
        "search": {"words": "x", "picture": None, "weight": 0.5, "where": "", "k": 9},
        "similar": {"row": 0, "where": "", "k": 9},
        "classify": {"picture": f"{FOLDER}/1.png", "labels": "a", "templates": "plain"},
        "heat_map": {"picture": f"{FOLDER}/1.png", "texts": "a"},
    }
    arguments = usual[function] | given
    if arguments.get("picture"):
        arguments["picture"] = str(folder / arguments["picture"])
    found = answer(getattr(desk, function), *arguments.values())
    assert 'role="alert"' in found
    assert expected in found
    assert not caplog.records  # the app has logged no unexpected error


def test_a_model_of_another_width_and_no_items(encoder, embeddings):
    for message, features in (("7 wide", torch.ones(2, 7)), ("no items", embeddings.features[:0])):
        with pytest.raises(ValueError, match=message):
            Desk(Embeddings(features), encoder, Pictures([]))


def test_what_nobody_foresaw_is_a_message_too(caplog):
    def fail():
        """Raise an error that the search app does not expect."""
        raise ZeroDivisionError("<b>")

    assert answer(fail) == '<p class="message" role="alert">this failed: &lt;b&gt;</p>'
    assert "ZeroDivisionError" in caplog.text


def test_captions_are_searched_where_there_are_no_images(encoder):
    texts = encoder.texts(["one", "two"])
    found = Desk(Embeddings(text_features=texts), encoder, Pictures([])).search("two", None, 0.5, "", 1)
    assert rows(found) == [1]
    assert "no picture" in found


def test_each_text_has_its_heat_map(desk, encoder, folder):
    texts = ["a red circle", '<img src=x onerror=alert(1)> & "quoted"']
    picture = held_out_scene(2).picture()
    picture.save(folder / "scene.png")
    maps = heat_maps(encoder.model, to_tensor(picture, 32), encoder.texts(texts))
    found = desk.heat_map(str(folder / "scene.png"), f"{texts[0]}\n\n {texts[1]} \n{texts[0]}\n")
    large = ImageOps.contain(picture.convert("RGB"), (MAP_SIDE, MAP_SIDE))  # heat maps are shown in this size
    shown = [
        (thumbnail(overlay(large, heat, limits_of(maps)), MAP_SIDE), html.escape(text), f"{heat.min():.4f} to")
        for text, heat in zip(texts, maps, strict=True)
    ]
    assert re.findall(r'src="(.*?)" alt=""><figcaption>(.*?)<span.*?>(\S+ to)', found) == shown
    assert shown[0][0] != shown[1][0]
