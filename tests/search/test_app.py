"""The app: what its functions answer."""

import html
import re

import pytest
import torch
from PIL import Image

from clipfast import Embeddings
from clipfast.images import ImageError
from clipfast.search.app import MAX_FOUND, MAX_LABELS, MAX_TEXT, Desk, Pictures, answer
from clipfast.search.samples import Samples

from .conftest import CAPTION, EVIL, FOLDER, rows


def test_search_by_words_gives_the_items_of_an_exact_search(desk, encoder, embeddings):
    query = encoder.texts(["something red"])
    expected = embeddings.search(query, 4)
    found = desk.search("something red", None, 0.5, "", 4)
    assert rows(found) == expected.indices[0].tolist()
    assert re.findall(r"<b>(-?[\d.]+)</b>", found) == [f"{score:.4f}" for score in expected.scores[0]]


def test_a_picture_finds_itself_and_the_weight_mixes_it_with_words(desk, folder, encoder, embeddings):
    picture = str(folder / FOLDER / "3.png")
    assert rows(desk.search("", picture, 0.5, "height < 50", 1)) == [3]
    for weight, words in ((1, "x"), (0, "x"), (0.3, "some words")):
        image = embeddings.features[3]
        text = encoder.texts([words])[0]
        mixed = torch.nn.functional.normalize(weight * image + (1 - weight) * text, dim=0)
        found = desk.search(words, picture, weight, "", 9)
        assert rows(found) == embeddings.search(mixed, 9).indices[0].tolist()


def test_a_filter_limits_what_is_found(desk):
    assert set(rows(desk.search("x", None, 0.5, "height >= 32 and height < 35", 9))) == {2, 3, 4}
    assert "No item fulfils the filter" in desk.search("x", None, 0.5, "height > 1000", 9)


def test_similar_ones_of_an_item_are_others(desk, embeddings):
    best = [row for row in embeddings.search(embeddings.features[4], 9).indices[0].tolist() if row not in (4, 6, 7, 8)]
    assert rows(desk.similar(4, "height < 50", 9)) == best


def test_it_starts_with_pictures_and_with_queries_that_find_what_they_say(desk, encoder, embeddings):
    assert rows(desk.start()) == list(range(9))
    texts = encoder.texts(["one", "two", "three"])
    captions = ["one", "<b>", "three"]  # the second is not what was embedded
    known = Desk(Embeddings(texts, {"caption": captions}), encoder, Pictures([])).samples()
    assert re.findall('data-words="(.*?)"', known) == ["one", "three"]
    assert Desk(Embeddings(texts), encoder, Pictures([])).samples() == ""


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
