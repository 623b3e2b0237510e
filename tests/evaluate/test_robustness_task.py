"""``clipfast eval robustness``: a perfect model, subsets of classes, baselines, ranks, kills, plots, wrong inputs."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from clipfast.evaluate.effective_robustness import Line

from .benchmark_sets import COLOURS, NAMES
from .eval_commands import check_refused, evaluated, printed, split, wrong_inputs

pytestmark = pytest.mark.usefixtures("by_colour")


def write_classes(folder, classes, count, seed):
    """Write a base or shifted set with a folder for each class, whose images are near the class's colour."""
    rng = np.random.default_rng(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            base = np.clip(np.array(COLOURS[colour]) + rng.integers(-9, 10, 3), 0, 255)
            Image.fromarray(np.full((12, 10, 3), base, np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a base set for robustness, and shifted sets with all of its classes, with three, and with other names."""
    folder = tmp_path_factory.mktemp("robustness")
    write_classes(folder / "base", {name: name for name in NAMES}, 30, 0)
    write_classes(folder / "all", {str(number): name for number, name in enumerate(NAMES)}, 20, 1)
    write_classes(folder / "some", {name: name for name in ("red", "green", "blue")}, 25, 2)
    write_classes(folder / "mixed", {"warm": "red", "cold": "blue", "odd": "grey"}, 10, 3)
    (folder / "mixed" / "warm" / "broken.png").write_bytes(b"broken")
    (folder / "map.json").write_text(json.dumps({"warm": ["red", "yellow"], "cold": [NAMES.index("blue")], "odd": []}))
    write_classes(folder / "unknown", {"red": "red", "umber": "red"}, 2, 4)
    # The accuracies of baseline models. Two or more models define the line of effective robustness.
    (folder / "points.csv").write_text("model,set,base,shift\na,some,0.3,0.2\nb,some,0.6,0.5\nc,some,0.9,0.8\n")
    (folder / "one.csv").write_text("model,base,shift\na,0.3,0.2\n")
    return folder


SOME = "--shift some={data}/some "
NATURAL = SOME + "--shift all={data}/all --shift mixed={data}/mixed --class-map mixed={data}/map.json "


def command(data, words, *more, model="perfect"):
    """Return the arguments of ``clipfast eval robustness`` for the base and shifted sets."""
    start = ["robustness", "--model", *model.split(), "--data", data / "base", "--device", "cpu"]
    return [*start, *split(words, data=data), *more]


def test_a_perfect_model_is_right_and_loses_nothing(data, capsys, tmp_path):
    picture = tmp_path / "p.svg"  # the plot shows accuracies of 1, whose log-odds are infinite
    out, err = printed(capsys, *command(data, NATURAL + "--synthetic blur jpeg", "--plot", picture))
    results = json.loads(out)
    assert "<svg" in picture.read_text()
    assert results["metrics"]["acc1"] == 1.0
    (model,) = results["models"]
    assert list(model["robustness"]) == ["some", "all", "mixed", "average", "blur", "jpeg", "synthetic"]
    for row in model["robustness"].values():
        assert [row[key] for key in ("base", "shift", "drop", "relative_drop", "effective")] == [1, 1, 0, 0, None]
    assert (err.count("left out"), err.count("broken.png")) == (1, 1)
    counts = {row["shift"]: (row["classes"], row["images"], row["base"]["images"]) for row in results["sets"]}
    assert counts == {"some": (3, 75, 90), "all": (7, 140, 210), "mixed": (2, 20, 90)}
    assert (results["sets"][2]["other_classes"], results["sets"][2]["skipped_images"]) == (10, 1)


def test_effective_robustness_is_what_is_beyond_the_line(data, capsys, tmp_path):
    words = SOME + "--baseline {data}/points.csv"
    results = evaluated(capsys, *command(data, words, "--json", tmp_path / "r.json", model="0.8 0.5"))
    line = results["baseline"]["some"]
    assert line["models"] == 3
    rows = [model["robustness"]["some"] for model in results["models"]]
    for row in rows:
        expected = Line(line["slope"], line["intercept"], ())(row["base"])
        assert (row["expected"], row["effective"]) == pytest.approx((expected, row["shift"] - expected))
    assert [row["robustness"] for row in results["sets"]] == rows
    # The results of one evaluation can be a baseline of the next one.
    again = evaluated(capsys, *command(data, SOME, "--baseline", tmp_path / "r.json"))
    assert again["baseline"]["some"]["models"] == 5
    assert again["models"][0]["robustness"]["some"]["expected"] == 1.0  # the model's base accuracy is 1


def test_models_of_the_baseline_are_evaluated_alike(data, capsys):
    words = NATURAL + "--synthetic hue "
    results = evaluated(capsys, *command(data, words + "--baseline-model 0.3 0.6 0.9", model="0.7"))
    alone = evaluated(capsys, *command(data, words, model="0.6"))
    own = alone["models"][0]["robustness"]
    assert results["baseline"].keys() == own.keys() == {"some", "all", "mixed", "average", "hue"}
    assert {name: (row["base"], row["shift"]) for name, row in own.items()} == {
        row["set"]: (row["base"], row["shift"]) for row in results["points"] if row["model"] == "0.6"
    }
    strengths = [row["metrics"]["acc1"] for row in alone["synthetic"]]
    assert own["hue"]["shift"] == pytest.approx(np.mean(strengths)) != strengths[0]
    for key in ("base", "shift"):
        assert own["average"][key] == pytest.approx(np.mean([own[name][key] for name in ("all", "some", "mixed")]))


def test_models_are_told_apart_by_their_weights(data, capsys):
    words = "--synthetic blur --pretrained large --baseline-model 0.3 0.9,other"
    results = evaluated(capsys, *command(data, words, model="0.5,small 0.5"))
    assert [row["pretrained"] for row in results["synthetic"]] == ["small"] * 5 + ["large"] * 5
    assert [row["model"] for row in results["points"]] == ["0.5 small", "0.5 large", "0.3 large", "0.9 other"]


def test_outputs(data, capsys, tmp_path):
    words = NATURAL + "--synthetic hue --baseline-model 0.3 0.6 --table "
    files = split("--plot {at}/p.png --examples {at}/e.png --json {at}/r", at=tmp_path)
    out, _ = printed(capsys, *command(data, words, *files, model="0.7 0.9"))
    results = json.loads((tmp_path / "r").read_text())
    row = results["models"][0]["robustness"]["some"]
    assert re.search(
        rf"^some +3 +{row['base']:.1%} .* {re.escape(format(row['effective'], '+.1%'))}$", out, re.MULTILINE
    )
    hue = [f"{row['metrics']['acc1']:.1%}" for row in results["synthetic"] if row["shift"] == "hue"]
    rows = [line.split() for line in out.splitlines() if line.startswith("hue ")]
    # A model's row in the table of strengths follows its row in the table of shifts.
    assert rows[1::2] == [["hue", *hue[:5]], ["hue", *hue[5:]]]
    for name in ("p.png", "e.png"):
        assert Image.open(tmp_path / name).size[0] > 500


ALL = "--shift a={data}/all "
WRONG = {
    "": "--shift or --synthetic is needed",
    "--shift {data}/all": "--shift must be a name and a source",
    ALL + ALL: "--shift a is given twice",
    "--shift blur={data}/all": "--shift blur: results have that name",
    "--shift a={data}/unknown": "the base lacks, such as 'umber'",
    "--synthetic --class-map a={data}/map.json": "--class-map a has no --shift",
    ALL + "--class-map a={data}/none": "there is no file {data}/none",
    "--synthetic fog": "must be one of blur, noise, jpeg, hue, rotation, occlusion",
    ALL + "--examples {tmp}/x.png": "give --synthetic",
    "--synthetic --baseline-model 0.5 0.5": "0.5 and 0.5",
    ALL + "--baseline {data}/one.csv": "a line needs at least two",
    ALL + "--baseline {data}/points.csv": "points.csv has no points of a",
    "--synthetic --examples {tmp}/x.txt": "--examples {tmp}/x.txt: the name must",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, data, capsys, tmp_path):
    check_refused(capsys, tmp_path, message, *command(data, ""), words=words, data=data)
