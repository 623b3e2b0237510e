"""Search commands (search, filter, cluster ...): answers against plain computation, files, and wrong inputs."""

import csv
import json
import tarfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import Embeddings
from clipfast.cli.main import main
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.zero_shot import TEMPLATES
from clipfast.io.text import align
from clipfast.models.images import open_image
from clipfast.search import source_samples as samples_module
from clipfast.search.similar import probabilities
from clipfast.search.source_samples import Samples, write_shards

from ..small_runs import output_of, picture, run_command


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    """Change to the folder of the search commands' model and data."""
    monkeypatch.chdir(home)


def results(capsys, *arguments):
    """Run a search command, and return the results that it writes as JSON."""
    out, _ = output_of(capsys, *arguments, "--json", "results.json", "--overwrite")
    text = Path("results.json").read_text()
    assert out == ("" if "--html" in arguments else text)  # with --html, a page is written and nothing is printed
    return json.loads(text)


@pytest.fixture(scope="module")
def encoder(home):
    """Return the model of the search commands."""
    return Encoder.load(f"local-dir:{home}/model", device="cpu")


def unit(x):
    """Return features scaled to unit length, to compare them with embedded ones."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def test_search_by_text_image_and_both(capsys, encoder):
    embeddings = Embeddings.open("embedded")
    features, texts, captions = embeddings.features, embeddings.text_features, embeddings.metadata["caption"]
    text = encoder.texts(["a red thing"])[0]
    image = encoder.images(encoder.transform(open_image(picture(3)))[None])[0]
    for words, query, items in (
        ("", text, features),
        ("--image one.png --weight 0.25", 0.25 * image + 0.75 * text, features),
        ("--kind text", text, texts),
    ):
        arguments = ["search", "embedded", *words.split(), "--text", "a red thing", "--k", "4"]
        found = results(capsys, *arguments)["queries"][0]["found"]
        scores = unit(items) @ unit(query)
        best = scores.topk(4).values.tolist()
        assert [one["score"] for one in found] == pytest.approx(best, abs=2e-3)  # the embeddings are stored in float16
        assert [float(scores[one["place"]]) for one in found] == pytest.approx(best, abs=2e-3)
        assert [one["caption"] for one in found] == [captions[one["place"]].as_py() for one in found]


def test_what_data_say_is_obeyed_by_no_terminal_and_no_spreadsheet(capsys, tmp_path):
    captions = ["\x1b[31mred", "two\nlines", "=1+1", "-0.5", "@a", "plain"]
    Embeddings(torch.eye(6)[[0, 0, 1, 1, 2, 2]], {"caption": captions}).save(tmp_path / "e")
    results(capsys, "dedup", tmp_path / "e", "--write", "spreadsheet.csv")
    captions[2], captions[4] = "'=1+1", "'@a"
    assert [row["caption"] for row in rows_of("spreadsheet.csv")] == captions
    shown = align([captions])
    assert not set("\x1b\n") & set(shown)
    assert "\\x1b[31mred" in shown


def rows_of(path):
    """Return the rows of a table that a search command wrote."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_search_with_a_filter_and_queries_of_a_file(capsys, home):
    (home / "queries.txt").write_text("a thing\nan odd thing\n")
    arguments = ["search", "embedded", "--queries", "queries.txt", "--where", "width >= 40 or key = 007"]
    found = results(capsys, *arguments, "--k", "5", "--html", "found.html")
    assert [query["query"] for query in found["queries"]] == ["a thing", "an odd thing"]
    assert all({one["place"] for one in query["found"]} == {21, 7} for query in found["queries"])
    page = (home / "found.html").read_text()
    assert page.count("<img ") == 4
    assert "width &gt;= 40 or key = 007" in page
    assert run_command(capsys, *arguments, "--table")[1].count("thing 21") == 2


@pytest.fixture(scope="module")
def loose(home):
    """Embed a folder of pictures without captions, and return the name of the folder of embeddings."""
    (home / "loose").mkdir()
    for index in range(6):
        (home / "loose" / f"{index}.png").write_bytes(picture(index))
    arguments = ["--model", f"local-dir:{home}/model", "--data", str(home / "loose"), "--device", "cpu"]
    assert main(["embed", *arguments, "--output", str(home / "embedded-loose")]) == 0
    return "embedded-loose"


@pytest.mark.parametrize("index", ["exact", pytest.param("faiss", marks=pytest.mark.long)])
def test_search_by_a_picture_of_the_folder_finds_others(index, loose, capsys):
    if index == "faiss":
        pytest.importorskip("faiss")
    search = ["search", loose, "--index", index, "--k"]
    pictures = ["--image", "loose/2.png", "loose/../loose/4.png"]
    alone = results(capsys, *search, "5", *pictures)["queries"]
    itself = results(capsys, *search, "5", *pictures, "--include-itself")["queries"]
    for place, others, every in zip((2, 4), alone, itself, strict=True):
        assert every["found"][0]["place"] == place
        assert sorted(one["place"] for one in others["found"]) == [one for one in range(6) if one != place]
        assert every["found"][1:] == others["found"][:4]
    both = results(capsys, "search", loose, "--k", str(2**31 - 1), "--image", "loose/2.png", "--text", "a", "b")
    assert [len(query["found"]) for query in both["queries"]] == [5, 5]


def test_dedup(capsys, home):
    arguments = ["--threshold", "0.9999", "--keep", "largest", "--write", "groups.csv", "--write-keys", "keys.txt"]
    found = results(capsys, "dedup", "embedded", *arguments, "--html", "groups.html")
    rows = rows_of("groups.csv")
    kept, left_out = ([row for row in rows if row["kept"] == one] for one in "10")
    assert (home / "groups.html").read_text().count('<span class="mark">kept</span>') == len(kept)
    groups = {row["place"]: row["group"] for row in rows}
    assert groups["3"] == groups["20"]
    assert (found["groups"], found["dropped"]) == (len(set(groups.values())), len(left_out))
    places = set(range(24)) - {int(row["place"]) for row in left_out}
    assert (home / "keys.txt").read_text().split() == [f"{place:03}" for place in sorted(places)]
    assert found["kept"] == len(places)


def test_filter(capsys, home):
    embeddings = Embeddings.open("embedded")
    scores = (unit(embeddings.features) * unit(embeddings.text_features)).sum(1)
    arguments = ["--write-keys", "kept.txt", "--write-shards", "kept", "--plot", "scores.png", "--html", "scores.html"]
    found = results(capsys, "filter", "embedded", "--top", "0.3", *arguments)
    best = sorted(scores.sort(descending=True).indices[:8].tolist())  # 0.3 of 24 pairs are 7.2, which is rounded up
    least = scores[best].min()
    assert (found["kept"], found["least_kept"]) == (8, pytest.approx(float(least), abs=1e-6))
    assert (home / "kept.txt").read_text().split() == [f"{place:03}" for place in best]
    check_shards(home / "kept", best, [8])
    for bound, kept in ((least - 1e-5, 8), (least + 1e-5, 7)):
        assert results(capsys, "filter", "embedded", "--min-score", f"{bound:.9f}")["kept"] == kept
    assert (home / "scores.html").read_text().count("<img ") == 24
    assert (home / "scores.png").exists()


def files_of(path):
    """Return the files of a tar shard that ``clipfast filter`` read or wrote."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def check_shards(folder, places, sizes):
    """Check that shards of ``clipfast filter`` hold the samples ``places`` under new keys, ``sizes`` in each shard."""
    source, kinds = files_of("data.tar"), ("png", "txt", "json")
    shards = [files_of(path) for path in sorted(folder.iterdir())]
    expected = {f"{place:09}.{kind}": source[f"{place:03}.{kind}"] for place in places for kind in kinds}
    assert {name: shard[name] for shard in shards for name in shard} == expected
    assert [len(shard) // 3 for shard in shards] == sizes


def test_shards_of_a_size_that_appear_as_a_whole(capsys, home, monkeypatch):
    samples, places = Samples.of(Embeddings.open("embedded").about), [0, 3, 4, 9, 11, 20, 23]
    monkeypatch.setattr(samples_module, "SHARD_SIZE", 3)
    assert write_shards(home / "small", samples, places) == []
    check_shards(home / "small", places, [3, 3, 1])
    monkeypatch.setattr(samples_module, "_add", mock.Mock(side_effect=OSError("no")))
    assert run_command(capsys, "filter", "embedded", "--top", "0.3", "--write-shards", "broken")[0] == 2
    assert not list(home.glob("*broken*"))


def test_cluster(capsys, home):
    arguments = ["--k", "4", "--label-by", "category", "--write", "clusters.parquet", "--html", "clusters.html"]
    found = results(capsys, "cluster", "embedded", *arguments)
    groups = groups_of("clusters.parquet")
    assert [one["size"] for one in found["clusters"]] == [groups.count(number) for number in range(4)]
    assert groups[3] == groups[20]
    page = (home / "clusters.html").read_text()
    assert all(f"cluster {one['cluster']}: {one['name']} ({one['size']:,} in" in page for one in found["clusters"])
    assert {one["name"] for one in found["clusters"]} <= {"even", "odd"}
    named = results(capsys, "cluster", "pictures", "--k", "2")["clusters"]  # clusters are named by captions
    assert all(one["name"] == one["nearest"][0]["caption"] for one in named)


def groups_of(path):
    """Return the cluster of each item in a table of ``clipfast cluster``."""
    return pytest.importorskip("pyarrow.parquet").read_table(path)["cluster"].to_pylist()


def test_clusters_are_named_by_given_words(loose, capsys, encoder, home):
    words = ["sky", "a red thing", "sea"]
    (home / "words.txt").write_text("sky\n\na red thing\nsea\n")
    found = results(capsys, "cluster", loose, "--k", "3", "--names", "words.txt", "--write", "named.parquet")
    groups = torch.tensor(groups_of("named.parquet"))
    likeness = unit(Embeddings.open(loose).features) @ encoder.texts(words).T
    for one in found["clusters"]:
        assert one["name"] == words[likeness[groups == one["cluster"]].sum(0).argmax()]


def test_classify(capsys, encoder, home):
    arguments = ["one.png", "two.png", "--labels", "cat", "dog", "--model", "local-dir:model", "--templates", "simple"]
    found = results(capsys, "classify", *arguments, "--html", "classes.html")["pictures"]
    image = encoder.images(encoder.transform(open_image(picture(3)))[None])
    logits = encoder.model.logit_scale.exp() * image @ encoder.classifier(["cat", "dog"], TEMPLATES["simple"])
    expected = dict(zip(("cat", "dog"), logits[0].softmax(0).tolist(), strict=True))
    assert found[0]["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert list(found[0]["probabilities"]) == sorted(expected, key=expected.get, reverse=True)
    assert (home / "classes.html").read_text().count("<img ") == 2


def test_sigmoid_of_a_model_with_a_bias(encoder):
    images, classifier = unit(torch.randn(3, 8)), unit(torch.randn(2, 8)).T
    with mock.patch.object(encoder.model, "logit_bias", torch.tensor(-2.0)):
        found = probabilities(encoder, images, classifier)
    torch.testing.assert_close(found, (encoder.model.logit_scale.exp() * images @ classifier - 2).sigmoid().detach())


WRONG = {
    "search embedded": "--text, --queries or --image",
    "search nothing --text a": "nothing holds no embeddings",
    "search embedded --text a --image one.png --weight 2": "--weight must be from 0 to 1, got 2",
    "search embedded --text a b --image one.png two.png one.png": "2 texts and 3 pictures",
    "search embedded --image none.png": "none.png: there is no such picture",
    "search embedded --image .": ". is a folder: name the pictures in it",
    "search embedded --text a --weight 0.3": "give both",
    "search embedded --image data.tar": "data.tar: not an image",
    "search embedded --text a --where width>9999": "holds for none of the 24 items",
    "search embedded --text a --model local-dir:other": "local-dir:other has other weights",
    "search pictures --text a --kind text": "embed pictures that have captions",
    "dedup embedded --threshold 2": "--threshold must be from -1 to 1, got 2",
    "dedup pictures --keep best": "needs features of images and texts",
    "filter embedded": "give either --min-score or --top",
    "filter embedded --top 0": "--top must be more than 0 and at most 1, got 0",
    "filter embedded --min-score nan": "--min-score must be from -1 to 1, got nan",
    "filter embedded --top 0.3 --write-shards embedded": "embedded exists already: give another name",
    "cluster embedded --k 25": "from 1 to the number of items, 24, got 25",
    "cluster embedded --k 2 --label-by colour": "no column 'colour'; there are: number",
    "cluster embedded --k 2 --names none.txt": "--names must be a file, got 'none.txt'",
    "cluster embedded --k 2 --names data.txt --label-by key": "give either --label-by or --names",
    "classify one.png --model local-dir:model": "give either --labels or --classnames",
    "classify one.png --model local-dir:model --labels a a": "--labels names 'a' twice",
    "classify one.png --model local-dir:model --labels a": "the only label is 'a', whose softmax is 1: give several",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input(command, capsys, home):
    before = sorted(home.iterdir())
    code, out, err = run_command(capsys, *command.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert WRONG[command] in err
    assert sorted(home.iterdir()) == before
