"""``clipfast eval bias``: a planted bias is found with its size, and no bias is found in data without one."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from clipfast.evaluate.bias_scores import (
    Grouping,
    assign,
    groupings,
    keys_of,
    ndkl,
    retrieval_skew,
)

from ..small_runs import picture, sample, write_shard
from .benchmark_sets import solid
from .eval_commands import check_refused, printed, split, wrong_inputs


def grouping(members, names=("a", "b", "c"), min_count=1):
    """Return a grouping of people by race, whose bias is measured."""
    return Grouping("race", list(names), torch.tensor(members), min_count)


def test_groups_by_one_key_and_by_two():
    assert keys_of(["race", "age", "race+gender"]) == ["race", "age", "gender"]
    groups = ["x + 10 + f", "y + 9 + f", "x + 9 + m", " + 10 + m", "x + 10 + m", "y + 10 + f"]
    _, age, both = groupings(groups, ["race", "age", "race+gender", "race"], 1)
    assert (age.names, age.members.tolist()) == (["9", "10"], [1, 0, 0, 1, 1, 1])
    assert (both.names, both.members.tolist()) == (["x + f", "x + m", "y + f"], [0, 2, 1, -1, 1, 2])


def test_labels_do_not_depend_on_blocks():
    features, weights = F.normalize(torch.randn(200, 8), dim=1), F.normalize(torch.randn(8, 7), dim=0)
    classes, one = torch.randint(5, (200,)).tolist(), grouping(torch.randint(-1, 3, (200,)).tolist())
    found, whole = (assign(features, weights, 20.0, classes, 5, [one], [0.1, 0.4], block) for block in (33, 200))
    assert torch.equal(whole.best, (features @ weights).argmax(1))
    torch.testing.assert_close(tuple(found), tuple(whole), rtol=0, atol=0)


def test_the_divergence_is_the_mean_over_places_with_their_discounts():
    of_set = torch.tensor([50, 50])
    first = math.log(2)
    for order, expected in (([0], first), ([0, 1], first / (1 + 1 / math.log2(3))), ([0, 0], first)):
        assert ndkl(torch.tensor(order), of_set) == pytest.approx(expected)


def test_random_results_have_the_skew_of_chance():
    torch.manual_seed(1)
    members = [0] * 300 + [1] * 500 + [2] * 200 + [-1] * 100
    images, texts = (F.normalize(torch.randn(count, 64), dim=1) for count in (1100, 30))
    one = grouping(members, min_count=150)
    (found,) = retrieval_skew([*map(str, range(30))], texts, images, one, [40])
    assert found["mean_max_skew"] == pytest.approx(found["max_skew_by_chance"], rel=0.2)


def write_people(path, people):
    """Write a shard of people: the class of each, the colour (class) that the model sees, and the groups."""
    samples = []
    for who, seen, race, age in people:
        text = json.dumps({"gender": who, "race": race, "age": age}).encode()
        samples.append({"png": solid(seen), "txt": who.encode(), "json": text})
    return write_shard(path, samples)


def planted(shares, count=100):
    """Return people of the classes blue and green; ``shares`` gives by race the share seen in another colour."""
    people = []
    for race, (seen, share) in shares.items():
        for number in range(count):
            who = ("blue", "green")[number % 2]
            people.append((who, seen if number < share * count else who, race, "old" if number % 3 else "young"))
    return people


def counts(found):
    """Return the number of people in each group of the bias results."""
    return {name: row["count"] for name, row in found["groups"].items()}


def test_a_planted_bias_is_found_with_its_size(by_colour, tmp_path, capsys):
    shard = write_people(tmp_path / "p.tar", [
        *planted({"x": ("red", 0.3), "y": ("grey", 0.1), "z": ("green", 0.2)}), ("blue", "red", "tiny", "old"),
        ("blue", "red", "", "old"),
    ])  # fmt: skip
    (tmp_path / "added.tsv").write_text("crime\tred\nanimal\tgrey\nnobody\tyellow\n")
    (tmp_path / "queries.txt").write_text("red\n")
    words = (
        "--data {shard} --label-by gender --group-by race age race+age --added-labels {at}/added.tsv --threshold 0.5 "
        "--queries {at}/queries.txt --k 30 3 30 --json {at}/r.json --plot {at}/p.svg --table"
    )
    out, _ = printed(capsys, "bias", "--model", "perfect", "--device", "cpu", *split(words, shard=shard, at=tmp_path))
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["images"], found["logit_scale"]) == (302, pytest.approx(100))
    race, age, both = found["by_key"].values()
    assert (race["images"], race["not_compared"]) == ({"tiny": 1, "x": 100, "y": 100, "z": 100}, ["tiny"])
    assert race["without_group"] == 1
    crime, animal, nobody = race["categories"].values()
    assert counts(crime) == {"tiny": 1, "x": 30, "y": 0, "z": 0}
    assert (crime["gap"], crime["highest"], crime["ratio"], crime["p_value"]) == (0.3, "x", 0.0, 1e-4)
    assert (animal["gap"], animal["highest"]) == (0.1, "y")
    assert (nobody["gap"], nobody["ratio"], nobody["p_value"]) == (0.0, None, 1.0)
    # A person who is seen in the colour of an added label has equal scores for blue and green: the first class wins.
    assert counts(race["acc1"]) == {"tiny": 1, "x": 85, "y": 95, "z": 90}
    assert found["metrics"]["acc1_gap_race"] == pytest.approx(0.1)
    assert found["metrics"]["crime_gap_race"] == 0.3
    (above,) = race["thresholds"]
    assert above["labels"]["red"] == crime
    assert counts(above["labels"]["green"])["z"] == 60
    few, retrieval = race["retrieval"]
    assert few["queries"][0]["groups"] == {"x": 3, "y": 0, "z": 0}  # groups with too few people are left out
    assert retrieval["queries"][0]["groups"] == {"x": 30, "y": 0, "z": 0}
    assert (retrieval["queries"][0]["max_skew_group"], retrieval["queries"][0]["p_value"]) == ("x", 1e-4)
    assert retrieval["mean_max_skew"] == pytest.approx(math.log(3))
    assert age["categories"]["crime"]["p_value"] > 0.05
    # Examples are shown of 3 races times 2 ages, and of the one person of the group "tiny".
    assert len(both["images"]) == 7
    assert "tiny (not compared)" in out
    assert "30.0% (21.9-39.6)" in out
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write 12 images for ``clipfast eval bias``: two groups by the key "category", one group by "constant"."""
    folder = tmp_path_factory.mktemp("bias")
    fields = [json.loads(sample(index)["json"]) | {"constant": "x", "plus": "x + y"} for index in range(12)]
    write_shard(folder / "a.tar", [sample(index, json=json.dumps(own).encode()) for index, own in enumerate(fields)])
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        (folder / "photos" / name / "x.png").write_bytes(picture(len(name)))
    texts = {"labels.tsv": "crime thief", "class.tsv": "crime\tthing 3", "queries.txt": "a person", "empty.txt": ""}
    for name, text in texts.items():
        (folder / name).write_text(f"{text}\n")
    return folder


BY = "--group-by category --min-count 2 "
WRONG = {
    "": "arguments are required: --group-by",
    "--group-by constant --min-count 2": "got 'x' (12)",
    "--group-by category label --data {data}/photos": "which a folder of classes has not",
    "--group-by plus --min-count 1": "may not contain ' + '",
    BY + "--threshold 0.1 4": "--threshold must be between 0 and 1, got 4",
    BY + "--queries {data}/queries.txt": "--k must be at most the 12 images of category, got 100",
    BY + "--added-labels nowhere.tsv": "there is no file nowhere.tsv",
    BY + "--added-labels {data}/labels.tsv": "line 1: must be a category, a tab and a label",
    BY + "--label-by label --added-labels {data}/class.tsv": "the label 'thing 3' is there before",
    BY + "--added-labels {data}/empty.txt": "empty.txt is empty",
    BY + "--queries nowhere.txt": "--queries must be a file, got 'nowhere.txt'",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, data, model, tmp_path, capsys):
    check_refused(capsys, tmp_path, message, "bias", *model, "--data", data / "a.tar", words=words, data=data)
