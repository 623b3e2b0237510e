"""The commands on an embedded folder: their answers against plain computation, what they write, and wrong inputs."""

import csv
import io
import json
import re
import tarfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import Embeddings
from clipfast.cli import main
from clipfast.columns import align
from clipfast.data import expand_shards, open_shards
from clipfast.evaluation.encoder import Encoder
from clipfast.images import open_image
from clipfast.search import shard_writer
from clipfast.search.samples import Samples
from clipfast.units import BYTES, scaled

from ..clip.conftest import picture, run_command


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    monkeypatch.chdir(home)


def results(capsys, *arguments):
    code, out, err = run_command(capsys, *arguments, "--json", "results.json", "--overwrite")
    assert code == 0, err
    text = Path("results.json").read_text()
    assert out == ("" if "--html" in arguments else text)  # a page takes the place of what is printed
    return json.loads(text)


@pytest.fixture(scope="module")
def encoder(home):
    return Encoder.load(f"local-dir:{home}/model", device="cpu")


def unit(x):
    return torch.nn.functional.normalize(x.float(), dim=-1)


def test_search_by_text_image_and_both(capsys, encoder):
    embeddings = Embeddings.open("embedded")
    text = encoder.texts(["a red thing"])[0]
    image = encoder.images(encoder.transform(open_image(picture(3)))[None])[0]
    queries = {("--text", "a red thing"): text, ("--image", "one.png"): image}
    queries[("--text", "a red thing", "--image", "one.png", "--weight", "0.25")] = 0.25 * image + 0.75 * text
    for arguments, query in queries.items():
        (found,) = results(capsys, "search", "embedded", *arguments, "--k", "4")["queries"]
        scores = unit(embeddings.features) @ unit(query)
        best = scores.sort(descending=True).values[:4]
        assert [one["score"] for one in found["found"]] == pytest.approx(best.tolist(), abs=2e-3)  # float16
        for one in found["found"]:
            assert scores[one["place"]] == pytest.approx(one["score"], abs=2e-3)
            assert one["caption"] == embeddings.metadata["caption"][one["place"]].as_py()


def test_search_by_a_picture_finds_it(capsys):
    (one, two) = results(capsys, "search", "embedded", "--image", "one.png", "two.png", "--k", "2")["queries"]
    assert {found["place"] for found in one["found"]} <= {3, 20, 21}
    assert two["found"][0]["place"] == 7
    assert two["found"][0]["score"] == pytest.approx(1, abs=2e-3)


def test_what_data_say_is_obeyed_by_no_terminal_and_no_spreadsheet(capsys, tmp_path):
    captions = ["\x1b[31mred", "two\nlines", "=1+1", "-0.5", "@a", "plain"]
    expected = ["\x1b[31mred", "two\nlines", "'=1+1", "-0.5", "'@a", "plain"]
    features = torch.eye(6)[[0, 0, 1, 1, 2, 2]]
    Embeddings(features, {"caption": captions}).save(tmp_path / "e")
    results(capsys, "dedup", tmp_path / "e", "--write", tmp_path / "groups.csv")
    with (tmp_path / "groups.csv").open(newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == expected
    print(align([captions]))
    out = capsys.readouterr().out
    assert (out.count("\n"), "\x1b" in out, "\\x1b[31mred" in out) == (1, False, True)


def test_search_finds_no_more_than_there_is(capsys):
    (found,) = results(capsys, "search", "embedded", "--text", "a", "--k", str(2**31 - 1))["queries"]
    assert sorted(one["place"] for one in found["found"]) == list(range(24))


def test_search_with_a_filter_and_queries_of_a_file(capsys, home):
    (home / "queries.txt").write_text("a thing\nan odd thing\n")
    arguments = ["search", "embedded", "--queries", "queries.txt", "--where", "width >= 40 or key = 007"]
    found = results(capsys, *arguments, "--k", "5", "--html", "found.html")
    assert [query["query"] for query in found["queries"]] == ["a thing", "an odd thing"]
    assert all({one["place"] for one in query["found"]} == {21, 7} for query in found["queries"])
    page = (home / "found.html").read_text()
    assert page.count("<img ") == 4
    assert "The 5 best for each query of 24 items in embedded where width &gt;= 40 or key = 007, by " in page
    code, out, err = run_command(capsys, *arguments, "--table", "--html", "again.html")
    size = scaled((home / "again.html").stat().st_size, BYTES)
    assert (code, err) == (0, f"wrote again.html, {size}\n")
    assert out.count("thing 21") == 2


@pytest.fixture(scope="module")
def loose(home):
    """The embeddings of a folder of pictures without captions."""
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
    arguments = ["search", loose, "--image", "loose/2.png", "loose/../loose/4.png", "--k", "5", "--index", index]
    alone = results(capsys, *arguments)["queries"]
    itself = results(capsys, *arguments, "--include-itself")["queries"]
    for place, others, every in zip((2, 4), alone, itself, strict=True):
        assert every["found"][0]["place"] == place
        assert sorted(one["place"] for one in others["found"]) == [one for one in range(6) if one != place]
        assert [one for one in every["found"] if one["place"] != place] == others["found"][:4]
    both = results(capsys, "search", loose, "--image", "loose/2.png", "--text", "a", "b", "--k", "9")["queries"]
    assert [len(query["found"]) for query in both] == [5, 5]


def test_nothing_is_shown_of_what_no_picture_has(loose, capsys, home):
    _, out, _ = run_command(capsys, "search", loose, "--text", "a", "--table", "--html", "loose.html")
    assert out.splitlines()[1].split() == ["score", "path"]
    assert sorted(re.findall('<p class="line name">(.*?)</p>', (home / "loose.html").read_text())) == [
        f"{index}.png" for index in range(6)
    ]
    _, out, _ = run_command(capsys, "cluster", loose, "--k", "2", "--table")
    assert out.splitlines()[2].split() == ["cluster", "size", "similarity"]


def test_search_in_texts(capsys):
    (found,) = results(capsys, "search", "embedded", "--text", "a red thing 0", "--kind", "text", "--k", "1")["queries"]
    assert found["found"][0]["place"] == 0


def test_dedup(capsys, home):
    arguments = ["--threshold", "0.9999", "--keep", "largest", "--write", "groups.csv", "--write-keys", "keys.txt"]
    found = results(capsys, "dedup", "embedded", *arguments, "--html", "groups.html")
    rows = list(csv.DictReader(io.StringIO((home / "groups.csv").read_text())))
    page = (home / "groups.html").read_text()
    assert page.count('<span class="mark">kept</span>') == [row["kept"] for row in rows].count("1")
    assert "Scores: cosine with the kept picture that each one is like." in page
    assert "largest groups are shown" not in page
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    assert found["groups"] == len(groups)
    left_out = [row for row in rows if row["kept"] == "0"]
    assert found["dropped"] == len(left_out) > 0
    assert all(float(row["similarity"]) >= 0.9999 and row["of"] != row["place"] for row in left_out)
    (own,) = [rows for rows in groups.values() if any(row["place"] == "3" for row in rows)]
    assert {"3", "20"} <= {row["place"] for row in own}
    assert {row["of"] for row in left_out} <= {row["place"] for row in rows if row["kept"] == "1"}
    keys = (home / "keys.txt").read_text().split()
    assert len(keys) == found["kept"] == 24 - found["dropped"]
    assert not {f"{int(row['place']):03}" for row in rows if row["kept"] == "0"} & set(keys)


def test_filter(capsys, home):
    embeddings = Embeddings.open("embedded")
    scores = (unit(embeddings.features) * unit(embeddings.text_features)).sum(1)
    arguments = ["--write-keys", "kept.txt", "--write-shards", "kept", "--plot", "scores.png", "--html", "scores.html"]
    found = results(capsys, "filter", "embedded", "--top", "0.3", *arguments)
    best = sorted(scores.sort(descending=True).indices[:8].tolist())  # 7.2 pairs are rounded up
    assert found["kept"] == 8
    assert found["least_kept"] == pytest.approx(float(scores[best].min()), abs=1e-6)
    assert (home / "kept.txt").read_text().split() == [f"{place:03}" for place in best]
    with tarfile.open(home / "data.tar") as tar:
        source = {member.name: tar.extractfile(member).read() for member in tar}
    assert files_of(home / "kept", source, best) == [8]
    for least in (scores[best].min() - 1e-5, scores[best].min() + 1e-5):
        kept = int((scores >= least).sum())
        assert results(capsys, "filter", "embedded", "--min-score", f"{least:.9f}")["kept"] == kept
    assert (home / "scores.png").stat().st_size > 1000
    assert (home / "scores.html").read_text().count("<img ") == 24


def files_of(folder, source, numbers):
    """Check the shards of a folder, and return how many samples each has."""
    copied, sizes = {}, []
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}
        copied |= found
        sizes.append(len(found) // 3)
    kinds = ("png", "txt", "json")
    assert copied == {f"{place:09}.{kind}": source[f"{place:03}.{kind}"] for place in numbers for kind in kinds}
    return sizes


def test_shards_of_a_size(home):
    samples, numbers = Samples.of(Embeddings.open("embedded").about), [0, 3, 4, 9, 11, 20, 23]
    with tarfile.open(home / "data.tar") as tar:
        source = {member.name: tar.extractfile(member).read() for member in tar}
    assert shard_writer.write_shards(home / "small", samples, numbers, shard_size=3) == []
    assert files_of(home / "small", source, numbers) == [3, 3, 1]
    assert len(open_shards(expand_shards(str(home / "small")))) == 7


def test_filter_leaves_no_folder_when_it_fails(capsys, home):
    with mock.patch.object(shard_writer, "_add", side_effect=OSError("no")):
        code, _, err = run_command(capsys, "filter", "embedded", "--top", "0.3", "--write-shards", "broken")
    assert code == 2
    assert err == "clipfast filter: error: no\n"
    assert not list(home.glob("*broken*"))


def test_cluster(capsys, home):
    from pyarrow import parquet

    arguments = ["--k", "4", "--label-by", "category", "--write", "clusters.parquet", "--html", "clusters.html"]
    found = results(capsys, "cluster", "embedded", *arguments)
    table = parquet.read_table(home / "clusters.parquet")
    groups = table["cluster"].to_pylist()
    assert [one["size"] for one in found["clusters"]] == [groups.count(number) for number in range(4)]
    assert groups[3] == groups[20]
    assert {one["name"] for one in found["clusters"]} <= {"even", "odd"}
    assert found == results(capsys, "cluster", "embedded", *arguments, "--overwrite")
    page = (home / "clusters.html").read_text()
    for one in found["clusters"]:
        assert f'<span class="name">cluster {one["cluster"]}: {one["name"]} ({one["size"]:,} in all)</span>' in page
    named = results(capsys, "cluster", "pictures", "--k", "2")["clusters"]  # by captions of the nearest pictures
    assert all(one["name"] == one["nearest"][0]["caption"] for one in named)


def test_clusters_are_named_by_given_words(loose, capsys, encoder, home):
    (home / "words.txt").write_text("sky\n\na red thing\nsea\n")
    found = results(capsys, "cluster", loose, "--k", "3", "--names", "words.txt", "--write", "named.parquet")
    from pyarrow import parquet

    groups = torch.tensor(parquet.read_table("named.parquet")["cluster"].to_pylist())
    features, texts = unit(Embeddings.open(loose).features), encoder.texts(["sky", "a red thing", "sea"])
    for one in found["clusters"]:
        best = (features[groups == one["cluster"]].sum(0) @ texts.T).argmax()
        assert one["name"] == ("sky", "a red thing", "sea")[best]


def test_classify(capsys, encoder, home):
    arguments = ["one.png", "two.png", "--labels", "cat", "dog", "--model", "local-dir:model", "--templates", "simple"]
    found = results(capsys, "classify", *arguments, "--html", "classes.html")
    from clipfast.evaluation.zero_shot import TEMPLATES

    image = encoder.images(encoder.transform(open_image(picture(3)))[None])
    logits = encoder.model.logit_scale.exp() * image @ encoder.classifier(["cat", "dog"], TEMPLATES["simple"])
    assert found["pictures"][0]["probabilities"] == pytest.approx(
        dict(zip(("cat", "dog"), logits[0].softmax(0).tolist(), strict=True)), abs=1e-5
    )
    assert next(iter(found["pictures"][1]["probabilities"].values())) >= 0.5
    shares = [share for one in found["pictures"] for share in one["probabilities"].values()]
    page = (home / "classes.html").read_text()
    assert all(f'<dd data-value="{round(share, 4)!r}">' in page for share in shares)  # none as 1.2e-05


def test_sigmoid_of_a_model_with_a_bias(encoder):
    from clipfast.search.classify_command import probabilities

    images, classifier = unit(torch.randn(3, 8)), unit(torch.randn(2, 8)).T
    with mock.patch.object(encoder.model, "logit_bias", torch.tensor(-2.0)):
        found = probabilities(encoder, images, classifier)
    torch.testing.assert_close(found, (encoder.model.logit_scale.exp() * images @ classifier - 2).sigmoid().detach())


WRONG = [
    ("search embedded", "give what to search for: --text, --queries or --image"),
    ("search nothing --text a", "nothing holds no embeddings"),
    ("search embedded --text a --weight 2", "--weight must be from 0 to 1, got 2"),
    ("search embedded --text a b --image one.png two.png one.png", "2 texts and 3 pictures: give as many of both"),
    ("search embedded --image none.png", "none.png: there is no such picture"),
    ("search embedded --image .", ". is a folder: name the pictures in it"),
    ("search embedded --text a --weight 0.3", "--weight is the share of a picture beside a text: give both"),
    ("search embedded --image data.tar", "data.tar: not an image in one of the formats"),
    ("search embedded --text a --where colour=red", "there is no column 'colour'; there are: number, key"),
    ("search embedded --text a --where width>9999", "--where 'width>9999' holds for none of the 24 items"),
    ("search embedded --text a --model local-dir:other", "local-dir:other has other weights or prepares images"),
    (
        "search pictures --text a --kind text",
        "needs text features, and there are none: embed pictures that have captions",
    ),
    ("dedup embedded --threshold 2", "--threshold must be from -1 to 1, got 2"),
    ("dedup embedded --write groups.txt", "--output groups.txt: the name must end in one of .csv, .tsv"),
    ("dedup pictures --keep best", "keep 'best' needs features of images and texts; there are only those of one kind"),
    ("filter embedded", "give either --min-score or --top"),
    ("filter embedded --top 0", "--top must be more than 0 and at most 1, got 0"),
    ("filter embedded --min-score nan", "--min-score must be from -1 to 1, got nan"),
    ("filter pictures --top 0.3", "such as beach.txt beside beach.jpg, with --images --texts to another folder"),
    ("filter embedded --top 0.3 --write-shards embedded", "--write-shards embedded exists already: give another name"),
    ("filter embedded --top 0.3 --plot a.xyz", "--plot a.xyz: the name must end in one of"),
    ("cluster embedded --k 0", "--k must be at least 1, got 0"),
    ("cluster embedded --k 25", "--k must be from 1 to the number of items, 24, got 25"),
    ("cluster embedded --k 2 --label-by colour", "--label-by: there is no column 'colour'; there are: number"),
    ("cluster embedded --k 2 --names none.txt", "--names must be a file, got 'none.txt'"),
    ("cluster embedded --k 2 --names data.txt --label-by key", "give either --label-by or --names"),
    ("cluster embedded --k 2 --write a.csv", "--output a.csv: the name must end in .parquet"),
    ("classify one.png --model local-dir:model", "give either --labels or --classnames"),
    ("classify one.png --model local-dir:model --labels a a", "--labels names 'a' twice"),
    ("classify none.png --model local-dir:model --labels a b", "none.png: there is no such picture"),
    ("classify . --model local-dir:model --labels a b", ". is a folder: name the pictures in it"),
    ("heatmap none.png a --model local-dir:model --output heat.png", "none.png: there is no such picture"),
    ("heatmap . a --model local-dir:model --output heat.png", ". is a folder: name the pictures in it"),
]


@pytest.mark.parametrize(("command", "message"), WRONG)
def test_wrong_input(command, message, capsys, home):
    before = sorted(home.iterdir())
    code, out, err = run_command(capsys, *command.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"clipfast {command.split()[0]}: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(home.iterdir()) == before


def test_a_page_of_data_that_have_changed(capsys, home):
    data = home / "data.tar"
    before = data.read_bytes()
    try:
        data.write_bytes(before + bytes(10240))
        code, _, err = run_command(capsys, "search", "embedded", "--text", "a", "--html", "changed.html")
    finally:
        data.write_bytes(before)
    assert code == 2
    assert "has changed since it was embedded: embed it again" in err
