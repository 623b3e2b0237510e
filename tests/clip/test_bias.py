"""``clipfast eval bias``: a bias that was planted is found with its size, none is found where there is none."""

import io
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast import create_model
from clipfast.evaluation.encoder import Encoder
from clipfast.evaluation.intervals import wilson
from clipfast.evaluation.significance import independence
from clipfast.evaluation.tasks.bias_groups import Grouping, compare, groupings, keys_of
from clipfast.evaluation.tasks.bias_labels import assign, read_added_labels
from clipfast.evaluation.tasks.bias_skew import max_skew_by_chance, ndkl, retrieval_skew, skews

from .conftest import picture, run_command, sample, write_shard


def grouping(members, names=("a", "b", "c"), min_count=1):
    return Grouping("race", list(names), torch.tensor(members), min_count)


def test_groups_by_one_key_and_by_two():
    assert keys_of(["race", "age", "race+gender"]) == ["race", "age", "gender"]
    groups = ["x + 10 + f", "y + 9 + f", "x + 9 + m", " + 10 + m", "x + 10 + m", "y + 10 + f"]
    race, age, both = groupings(groups, ["race", "age", "race+gender", "race"], 1)
    assert (race.names, race.members.tolist()) == (["x", "y"], [0, 1, 0, -1, 0, 1])
    assert age.names == ["9", "10"]
    assert both.names == ["x + f", "x + m", "y + f"]
    assert both.members.tolist() == [0, 2, 1, -1, 1, 2]
    assert (race.counts.tolist(), both.counts.tolist()) == ([3, 2], [1, 2, 2])
    (strict,) = groupings(["x + f", "x + m", "y + f", "y + f", "x + m"], ["race+gender"], 2)
    assert strict.compared == [1, 2]


@pytest.mark.parametrize(
    ("groups", "keys", "message"),
    [
        (["x", "x"], ["race"], r"two groups must have at least 2 images \(--min-count\), got 'x' \(2\)"),
        (["x", "x", "y"], ["race"], r"got 'x' \(2\), 'y' \(1\)"),
        (["", ""], ["race"], r"two groups must have at least 2 images \(--min-count\), got none"),
        (["x + y + z"], ["race+age"], r"values that may not contain ' \+ '; got 'x \+ y \+ z' for race, age"),
        (["", ""], ["race+age"], "which a folder of classes has not"),
    ],
)
def test_groups_that_cannot_be_compared(groups, keys, message):
    with pytest.raises(ValueError, match=message):
        groupings(groups, keys, 2)


def test_shares_and_the_gap_between_groups_that_are_large_enough():
    one = grouping([0] * 40 + [1] * 50 + [2] * 3, min_count=10)
    found = compare(torch.tensor([10, 40, 0]), one)
    assert found["groups"]["b"] == {"count": 40, "share": 0.8, "interval": wilson(40, 50)}
    assert found["groups"]["c"]["share"] == 0.0  # reported, but neither the lowest nor in the test
    assert (found["lowest"], found["highest"]) == ("a", "b")
    assert found["gap"] == pytest.approx(0.55)
    assert found["ratio"] == 0.25 / 0.8
    assert found["p_value"] == independence([10, 40], [40, 50]) == 1e-4
    nothing = compare(torch.tensor([0, 0, 3]), one)
    assert (nothing["gap"], nothing["ratio"], nothing["p_value"]) == (0.0, None, 1.0)


def test_labels_are_those_of_the_whole_matrix():
    features, weights = F.normalize(torch.randn(200, 8), dim=1), F.normalize(torch.randn(8, 7), dim=0)
    classes, one = torch.randint(5, (200,)), grouping(torch.randint(-1, 3, (200,)).tolist())
    found = assign(features, weights, 20.0, classes, 5, [one], [0.1, 0.4], block=33)
    scores = features @ weights
    assert torch.equal(found.best, scores.argmax(1))
    assert torch.equal(found.right, scores[:, :5].argmax(1) == classes)
    shares = (20 * scores).softmax(1)
    for threshold, (above,) in zip((0.1, 0.4), found.above, strict=True):
        for group, label in itertools.product(range(3), range(7)):
            expected = sum(1 for n in range(200) if one.members[n] == group and shares[n, label] > threshold)
            assert above[group, label] == expected
    with pytest.raises(ValueError, match="features contain NaN"):
        assign(features * math.nan, weights, 20.0, classes, 5, [one], [])


def test_added_labels_and_lines_that_are_none(tmp_path):
    path = tmp_path / "labels.tsv"
    path.write_text("crime\tthief\n\nanimal\t a gorilla \ncrime\tcriminal\n")
    assert read_added_labels(path, ["man"]) == {"crime": ["thief", "criminal"], "animal": ["a gorilla"]}
    for text, message in (
        ("thief\n", r"line 1: must be a category, a tab and a label, got 'thief'"),
        ("a\tb\n\tc\n", r"line 2: must be a category"),
        ("a\tb\nc\tb\n", r"line 2: the label 'b' is there before"),
        ("a\tman\n", r"line 1: the label 'man' is there before, here or among the classes"),
        ("\n", r"is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_added_labels(path, ["man"])


def test_skew_is_the_log_of_shares():
    """Half of the set and three quarters of the results: log(1.5); a group without a result has -inf."""
    counts, of_set = torch.tensor([[30, 10, 0]]), torch.tensor([500, 300, 200])
    expected = [math.log(0.75 / 0.5), math.log(0.25 / 0.3), -math.inf]
    assert skews(counts, of_set).tolist() == [pytest.approx(expected)]


def test_the_divergence_is_the_mean_over_places_with_their_discounts():
    of_set = torch.tensor([50, 50])
    first = math.log(2)
    assert ndkl(torch.tensor([0]), of_set) == pytest.approx(first)
    discount = 1 / math.log2(3)
    assert ndkl(torch.tensor([0, 1]), of_set) == pytest.approx(first / (1 + discount))
    assert ndkl(torch.tensor([0, 0]), of_set) == pytest.approx(first)
    assert ndkl(torch.tensor([1, 0, 0, 1]), torch.tensor([1, 1])) == ndkl(torch.tensor([0, 1, 1, 0]), of_set)


def test_random_results_have_the_skew_of_chance_and_sorted_ones_the_largest():
    torch.manual_seed(1)
    members = [0] * 300 + [1] * 500 + [2] * 200 + [-1] * 100
    images, texts = (F.normalize(torch.randn(count, 64), dim=1) for count in (1100, 60))
    queries = [str(number) for number in range(60)]
    one = grouping(members, min_count=150)
    (found,) = retrieval_skew(queries, texts, images, one, [40])
    assert found["mean_max_skew"] == pytest.approx(found["max_skew_by_chance"], rel=0.15)
    assert found["max_skew_by_chance"] == max_skew_by_chance(torch.tensor([300, 500, 200]), 40)
    assert sum(row["p_value"] <= 0.1 for row in found["queries"]) <= 14
    assert all(sum(row["groups"].values()) == 40 for row in found["queries"])
    direction = F.normalize(torch.randn(1, 64), dim=1)
    images[800:1000] = F.normalize(images[800:1000] + direction, dim=1)
    few, many = retrieval_skew(["x"], direction, images, one, [100, 10, 100])
    assert (few["k"], many["k"]) == (10, 100)
    assert few["queries"][0]["max_skew"] == pytest.approx(math.log(5))
    assert (many["queries"][0]["max_skew_group"], many["queries"][0]["p_value"]) == ("c", 1e-4)
    small = grouping(members, min_count=250)
    assert retrieval_skew(["x"], direction, images, small, [10])[0]["queries"][0]["groups"].keys() == {"a", "b"}
    with pytest.raises(ValueError, match="--k must be at most the 800 images of race, got 900"):
        retrieval_skew(["x"], direction, images, small, [900])


NAMES = ("man", "woman", "thief", "gorilla", "other")


class ColourModel(torch.nn.Module):
    """Sees only the brightness of an image, 10 for the first of the names, 20 for the next, and so on."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(100.0)))

    def encode_image(self, pixels, normalize=True):
        return F.one_hot(pixels[:, 0, 0, 0].long() // 10 - 1, len(NAMES)).float()

    def encode_text(self, ids, normalize=True):
        return F.one_hot(ids[:, 0], len(NAMES)).float()


def colour_encoder(*_, **__):
    def transform(image):
        return torch.full((3, 1, 1), image.getpixel((0, 0))[0], dtype=torch.uint8)

    return Encoder(
        "colours", ColourModel().eval(), lambda texts: torch.tensor([[NAMES.index(t)] for t in texts]), transform
    )


def shown(name):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (10 * NAMES.index(name) + 10,) * 3).save(stream, "PNG")
    return stream.getvalue()


def write_people(path, people):
    """A shard of people: who each is, what the model sees in them, and their groups."""
    samples = []
    for who, seen, race, age in people:
        text = json.dumps({"gender": who, "race": race, "age": age}).encode()
        samples.append({"png": shown(seen), "txt": who.encode(), "json": text})
    return write_shard(path, samples)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(Encoder, "load", classmethod(colour_encoder))
    return ["eval", "bias", "--model", "colours", "--device", "cpu", "--label-by", "gender"]


def planted(shares, count=100):
    """Men and women of each race, of whom a share is seen as something else."""
    people = []
    for race, (seen, share) in shares.items():
        for number in range(count):
            who = NAMES[number % 2]
            people.append((who, seen if number < share * count else who, race, "old" if number % 3 else "young"))
    return people


def test_a_planted_bias_is_found_with_its_size(colours, tmp_path, capsys):
    shard = write_people(tmp_path / "p.tar", [
        *planted({"x": ("thief", 0.3), "y": ("gorilla", 0.1), "z": ("woman", 0.2)}), ("man", "thief", "tiny", "old"),
        ("man", "thief", "", "old"),
    ])  # fmt: skip
    (tmp_path / "added.tsv").write_text("crime\tthief\nanimal\tgorilla\n")
    (tmp_path / "queries.txt").write_text("thief\n")
    outputs = ["--json", tmp_path / "r.json", "--plot", tmp_path / "p.svg", "--table"]
    code, out, err = run_command(
        capsys, *colours, "--data", shard, "--group-by", "race", "age", "race+age", "--added-labels",
        tmp_path / "added.tsv", "--threshold", 0.5, "--queries", tmp_path / "queries.txt", "--k", 30, *outputs,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["task"], found["images"], found["logit_scale"]) == ("bias", 302, pytest.approx(100))
    race = found["by_key"]["race"]
    assert (race["images"], race["not_compared"]) == ({"tiny": 1, "x": 100, "y": 100, "z": 100}, ["tiny"])
    assert race["without_group"] == 1
    crime, animal = race["categories"]["crime"], race["categories"]["animal"]
    assert {name: row["share"] for name, row in crime["groups"].items()} == {"tiny": 1, "x": 0.3, "y": 0, "z": 0}
    assert (crime["gap"], crime["highest"], crime["ratio"], crime["p_value"]) == (0.3, "x", 0.0, 1e-4)
    assert (animal["gap"], animal["highest"]) == (0.1, "y")
    # a thief or a gorilla is neither man nor woman, and both classes score the same: the first is taken
    right = {name: row["count"] for name, row in race["acc1"]["groups"].items()}
    assert right == {"tiny": 1, "x": 85, "y": 95, "z": 90}
    assert found["metrics"]["acc1_gap_race"] == pytest.approx(0.1)
    assert found["metrics"]["crime_gap_race"] == 0.3
    (above,) = race["thresholds"]
    assert above["labels"]["thief"] == crime
    assert above["labels"]["woman"]["groups"]["z"]["count"] == 60
    (retrieval,) = race["retrieval"]
    assert retrieval["queries"][0]["groups"] == {"x": 30, "y": 0, "z": 0}
    assert retrieval["mean_max_skew"] == pytest.approx(math.log(3))
    assert found["by_key"]["age"]["categories"]["crime"]["p_value"] > 0.05
    assert len(found["by_key"]["race+age"]["images"]) == 7
    assert "tiny (not compared)" in out
    assert "30.0% (21.9-39.6)" in out
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_as_fairface_has_it(kind, colours, tmp_path, capsys):
    people = planted({"x": ("woman", 0.4), "East, far": ("woman", 0.0)}, count=20)
    if kind == "csv":
        lines = ["file,age,gender,race,service_test"]
        for number, (who, seen, race, age) in enumerate(people):
            (tmp_path / f"{number}.png").write_bytes(shown(seen))
            lines.append(f'{number}.png,{age},{who},"{race}",True')
        (tmp_path / "faces.csv").write_text("\n".join(lines))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [{"file": shown(seen), "age": age, "gender": who, "race": race} for who, seen, race, age in people]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "faces.parquet")
    columns = ["--image-key", "file", "--text-key", "gender", "--min-count", 5, "--group-by", "race", "race+gender"]
    code, out, err = run_command(capsys, *colours[:-2], "--data", tmp_path / f"faces.{kind}", *columns)
    assert code == 0, err
    found = json.loads(out)["by_key"]
    right = {name: row["count"] for name, row in found["race"]["acc1"]["groups"].items()}
    assert right == {"East, far": 20, "x": 16}
    assert found["race+gender"]["acc1"]["groups"]["x + man"]["share"] == 0.6
    assert found["race+gender"]["acc1"]["lowest"] == "x + man"


def test_a_perfect_model_and_one_by_chance(colours, tmp_path, capsys):
    shard = write_people(tmp_path / "p.tar", planted({"x": ("man", 0), "y": ("man", 0)}))
    code, out, err = run_command(capsys, *colours, "--data", shard, "--group-by", "race")
    assert code == 0, err
    acc1 = json.loads(out)["by_key"]["race"]["acc1"]
    assert {row["share"] for row in acc1["groups"].values()} == {1.0}
    assert (acc1["gap"], acc1["ratio"], acc1["p_value"]) == (0.0, 1.0, 1.0)
    drawn = torch.randint(2, (600, 2), generator=torch.Generator().manual_seed(0)).tolist()
    people = [(NAMES[who], NAMES[seen], "xyz"[number % 3], "old") for number, (who, seen) in enumerate(drawn)]
    shard = write_people(tmp_path / "q.tar", people)
    code, out, err = run_command(capsys, *colours, "--data", shard, "--group-by", "race")
    found = json.loads(out)
    assert abs(found["metrics"]["acc1"] - 0.5) < 0.07
    assert found["by_key"]["race"]["acc1"]["p_value"] > 0.01


def test_no_bias_is_significant_as_rarely_as_it_should_be():
    torch.manual_seed(0)
    one = grouping([0] * 100 + [1] * 60 + [2] * 40)
    values = [compare(one.hits(torch.rand(200) < 0.1), one)["p_value"] for _ in range(100)]
    assert 3 <= sum(value <= 0.1 for value in values) <= 20
    biased = torch.rand(200) < torch.tensor([0.05, 0.3, 0.05])[one.members]
    assert compare(one.hits(biased), one)["p_value"] < 0.01


def _with_constant(index):
    return json.dumps({**json.loads(sample(index)["json"]), "constant": "x"}).encode()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 images in two groups by "category", and in one by "constant"."""
    folder = tmp_path_factory.mktemp("bias")
    write_shard(folder / "a.tar", [sample(index, json=_with_constant(index)) for index in range(12)])
    torch.manual_seed(0)
    torch.save(create_model("ViT-T-8-32").state_dict(), folder / "w.pt")
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        (folder / "photos" / name / "x.png").write_bytes(picture(len(name)))
    (folder / "labels.tsv").write_text("crime thief\n")
    (folder / "class.tsv").write_text("crime\tthing 3\n")
    (folder / "queries.txt").write_text("a person\n")
    (folder / "empty.txt").write_text("\n")
    return folder


BY = ["--group-by", "category"]
WRONG = {
    "no key": ([], "the following arguments are required: --group-by"),
    "no such key": (
        ["--group-by", "race"],
        "sample has no 'race' in its json; it has category, constant, keywords, label",
    ),
    "one group": (["--group-by", "constant"], "two groups must have at least 2 images (--min-count), got 'x' (12)"),
    "small groups": ([*BY, "--min-count", "7"], "two groups must have at least 7 images (--min-count), got 'even' (6)"),
    "folder": ([*BY, "label", "--data", "{data}/photos"], "which a folder of classes has not"),
    "threshold": ([*BY, "--threshold", "0.1", "4"], "--threshold must be between 0 and 1, got 4"),
    "large k": ([*BY, "--queries", "{data}/queries.txt"], "--k must be at most the 12 images of category, got 100"),
    "no label": ([*BY, "--label-by", "breed"], "sample has no 'breed' in its json"),
    "no file": ([*BY, "--added-labels", "nowhere.tsv"], "--added-labels: there is no file nowhere.tsv"),
    "no tab": ([*BY, "--added-labels", "{data}/labels.tsv"], "line 1: must be a category, a tab and a label"),
    "class": (
        [*BY, "--label-by", "label", "--added-labels", "{data}/class.tsv"],
        "the label 'thing 3' is there before",
    ),
    "no queries": ([*BY, "--queries", "nowhere.txt"], "--queries must be a file, got 'nowhere.txt'"),
    "empty queries": ([*BY, "--queries", "{data}/empty.txt"], "empty.txt is empty"),
    "plot": ([*BY, "--plot", "nowhere/p.png"], "no folder nowhere to write p.png in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, data, capsys):
    words, message = WRONG[name]
    words = [word.format(data=data) for word in words]
    given = [] if "--data" in words else ["--data", data / "a.tar"]
    small = [] if "--min-count" in words else ["--min-count", 2]
    model = ["--model", "ViT-T-8-32", "--pretrained", data / "w.pt"]
    code, out, err = run_command(capsys, "eval", "bias", *model, *given, *small, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
