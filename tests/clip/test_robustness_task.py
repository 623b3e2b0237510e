"""``clipfast eval robustness``: perfect and random models, subsets, baselines, ranks, kills, pictures, wrong inputs."""

import json
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast import ranks
from clipfast.cli import main
from clipfast.evaluation.encoder import Encoder
from clipfast.evaluation.shifts import AMOUNTS
from clipfast.evaluation.tasks import robustness
from clipfast.ranks import run_ranks

from .conftest import run_command, write_shard

ranks.PRELOAD.append("clipfast.evaluation.encoder")
COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40),
    "cyan": (40, 210, 210), "violet": (200, 50, 210), "grey": (128, 128, 128),
}  # fmt: skip
NAMES = sorted(COLOURS)


class ByColour(Encoder):
    """A model that knows images and texts by the colour of their class, as far as its name says: a share, or at random.

    What it gets wrong is the same in every process, and for every batch.
    """

    @classmethod
    def load(cls, name, pretrained=None, **_):
        return cls(name, None, None, mean_colour, "cpu", pretrained)

    def about(self):
        return {"model": self.name, "pretrained": self.pretrained}

    def images(self, pixels):
        found = pixels.flatten(1).float()
        near = torch.cdist(found, torch.tensor([COLOURS[name] for name in NAMES]).float()).argmin(1)
        if self.name != "perfect":
            keys = (found @ torch.tensor([977.0, 31.0, 7.0]) % 101) / 101
            share = 0.0 if self.name == "random" else float(self.name)
            spread = (found @ torch.tensor([13.0, 457.0, 3.0])).long() % len(NAMES)
            near = torch.where(keys < share, near, spread)
        return F.one_hot(near, len(NAMES)).float()

    def texts(self, texts, store=None, world=None):
        return F.one_hot(torch.tensor([NAMES.index(text) for text in texts], dtype=torch.long), len(NAMES)).float()


def mean_colour(image):
    return torch.from_numpy(np.asarray(image, np.float32).mean((0, 1)).round())[:, None, None]


@pytest.fixture(autouse=True)
def by_colour(monkeypatch):
    monkeypatch.setattr("clipfast.evaluation.encoder.Encoder", ByColour)


def write_classes(folder, classes, count, seed):
    """A folder of classes with images near the colour of each; ``classes`` maps folders to colours."""
    rng = np.random.default_rng(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            base = np.clip(np.array(COLOURS[colour]) + rng.integers(-9, 10, 3), 0, 255)
            Image.fromarray(np.full((12, 10, 3), base, np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A base of seven classes; shifts with all of them, with three, and with classes of other names."""
    folder = tmp_path_factory.mktemp("robustness")
    write_classes(folder / "base", {name: name for name in NAMES}, 30, 0)
    write_classes(folder / "all", {str(number): name for number, name in enumerate(NAMES)}, 20, 1)
    write_classes(folder / "some", {name: name for name in ("red", "green", "blue")}, 25, 2)
    write_classes(folder / "mixed", {"warm": "red", "cold": "blue", "odd": "grey"}, 10, 3)
    (folder / "mixed" / "warm" / "broken.png").write_bytes(b"broken")
    (folder / "map.json").write_text(json.dumps({"warm": ["red", "yellow"], "cold": [NAMES.index("blue")], "odd": []}))
    write_classes(folder / "unknown", {"red": "red", "umber": "red"}, 2, 4)
    write_classes(folder / "numbered", {"0": "red", "1": "green"}, 2, 5)
    (folder / "points.csv").write_text("model,set,base,shift\na,some,0.3,0.2\nb,some,0.6,0.5\nc,some,0.9,0.8\n")
    (folder / "average.csv").write_text("model,set,base,shift\na,average,0.3,0.2\nb,average,0.6,0.5\n")
    (folder / "one.csv").write_text("model,base,shift\na,0.3,0.2\n")
    return folder


def command(data, *more, model="perfect"):
    return ["eval", "robustness", "--model", *model.split(), "--data", data / "base", "--device", "cpu", *more]


def evaluated(capsys, *arguments):
    code, out, err = run_command(capsys, *arguments)
    assert code == 0, err
    return json.loads(out), err


def shifts(data):
    found = [f"all={data}/all", f"some={data}/some", f"mixed={data}/mixed"]
    return [word for shift in found for word in ("--shift", shift)] + ["--class-map", f"mixed={data}/map.json"]


def test_a_perfect_model_is_right_and_loses_nothing(data, capsys):
    results, err = evaluated(capsys, *command(data, *shifts(data), "--synthetic", "blur", "jpeg"))
    assert results["metrics"]["acc1"] == 1.0
    ((name, weights, found),) = [row.values() for row in results["models"]]
    assert (name, weights) == ("perfect", "")
    assert list(found) == ["all", "some", "mixed", "average", "blur", "jpeg", "synthetic"]
    for row in found.values():
        assert (row["base"], row["shift"], row["drop"], row["relative_drop"]) == (1.0, 1.0, 0.0, 0.0)
        assert row["effective"] is None
    assert "left out" in err
    assert "broken.png" in err
    assert err.count("left out") == 1
    counts = [(row["shift"], row["classes"], row["images"], row["base"]["images"]) for row in results["sets"]]
    assert counts == [("all", 7, 140, 210), ("some", 3, 75, 90), ("mixed", 2, 20, 90)]
    mixed = results["sets"][2]
    assert (mixed["other_classes"], mixed["skipped_images"], mixed["dataset"]) == (10, 1, f"{data}/mixed")
    for row in (results, *results["sets"], *results["synthetic"]):
        assert {"dataset", "model", "pretrained", "task", "metrics", "language", "intervals"} <= row.keys()
        assert (row["task"], set(row["metrics"])) == (
            "zeroshot_classification", {"acc1", "acc5", "mean_per_class_recall"},
        )  # fmt: skip
    assert [(row["shift"], row["strength"]) for row in results["synthetic"]] == [
        (kind, strength) for kind in ("blur", "jpeg") for strength in range(1, 6)
    ]


def test_a_random_model_scores_chance_over_the_classes_of_each_set(data, capsys):
    results, _ = evaluated(capsys, *command(data, *shifts(data), "--synthetic", "noise", model="random"))
    found = results["models"][0]["robustness"]
    # what it says is one of seven classes; where that is not in the subset all scores are equal, and the first is taken
    for name, classes in (("all", 7), ("noise", 7)):
        for key in ("base", "shift"):
            assert abs(found[name][key] - 1 / classes) < 0.12, (name, key)
    assert 0.2 < found["some"]["shift"] < 0.5
    low, high = found["all"]["base_interval"]
    assert low < found["all"]["base"] < high
    assert high - low < 0.12


def test_effective_robustness_is_what_is_beyond_the_line(data, capsys, tmp_path):
    given = ["--shift", f"some={data}/some", "--baseline", data / "points.csv"]
    results, _ = evaluated(capsys, *command(data, *given, "--json", tmp_path / "r.json", model="0.8 0.5"))
    line = results["baseline"]["some"]
    assert line["models"] == 3
    for model in results["models"]:
        row = model["robustness"]["some"]
        log_odds = np.log(row["base"] / (1 - row["base"]))
        expected = 1 / (1 + np.exp(-(line["slope"] * log_odds + line["intercept"])))
        assert row["expected"] == pytest.approx(expected)
        assert row["effective"] == pytest.approx(row["shift"] - expected)
        assert row["relative_drop"] == pytest.approx((row["base"] - row["shift"]) / row["base"])
    assert [row["robustness"] for row in results["sets"]] == [row["robustness"]["some"] for row in results["models"]]
    roles = [(row["model"], row["role"]) for row in results["points"]]
    assert roles == [("0.8", "model"), ("0.5", "model"), ("a", "baseline"), ("b", "baseline"), ("c", "baseline")]
    # the results of one call are a baseline of the next
    again, _ = evaluated(capsys, *command(data, "--shift", f"some={data}/some", "--baseline", tmp_path / "r.json"))
    assert again["baseline"]["some"]["models"] == 5
    assert again["models"][0]["robustness"]["some"]["expected"] == 1.0  # of all that is right on the base


def test_points_without_a_set_are_those_of_the_only_shifted_set(data, capsys, tmp_path):
    (tmp_path / "b.csv").write_text("model,base,shift\na,0.3,0.2\nb,0.6,0.5\n")
    given = ["--synthetic", "blur", "hue", "--baseline", tmp_path / "b.csv"]
    results, _ = evaluated(capsys, *command(data, "--shift", f"some={data}/some", *given))
    assert set(results["baseline"]) == {"some"}
    results, _ = evaluated(capsys, *command(data, *given))
    assert set(results["baseline"]) == {"synthetic"}
    results, _ = evaluated(capsys, *command(data, *shifts(data), *given))
    assert set(results["baseline"]) == {"average"}
    results, _ = evaluated(capsys, *command(data, "--synthetic", "blur", *given[3:]))
    assert set(results["baseline"]) == {"blur"}


def test_models_of_the_baseline_are_evaluated_alike(data, capsys):
    given = [*shifts(data), "--baseline-model", "0.3", "0.6", "0.9"]
    results, _ = evaluated(capsys, *command(data, *given, "--synthetic", "hue", model="0.7"))
    alone, _ = evaluated(capsys, *command(data, *shifts(data), "--synthetic", "hue", model="0.6"))
    assert set(results["baseline"]) == {"all", "some", "mixed", "average", "hue"}
    of_0_6 = {row["set"]: (row["base"], row["shift"]) for row in results["points"] if row["model"] == "0.6"}
    own = alone["models"][0]["robustness"]
    strengths = [row["metrics"]["acc1"] for row in alone["synthetic"]]
    assert len(set(strengths)) > 1
    assert own["hue"]["shift"] == pytest.approx(sum(strengths) / 5)
    assert of_0_6 == {name: (row["base"], row["shift"]) for name, row in own.items()}
    assert own["average"]["shift"] == pytest.approx(sum(own[name]["shift"] for name in ("all", "some", "mixed")) / 3)
    assert own["average"]["base"] == pytest.approx(sum(own[name]["base"] for name in ("all", "some", "mixed")) / 3)
    low, high = own["average"]["base_interval"]
    assert low < own["average"]["base"] < high


def test_models_are_told_apart_by_their_weights(data, capsys):
    given = ["--synthetic", "blur", "--pretrained", "large", "--baseline-model", "0.3", "0.9,other"]
    results, _ = evaluated(capsys, *command(data, *given, model="0.5,small 0.5"))
    assert [(row["model"], row["pretrained"]) for row in results["models"]] == [("0.5", "small"), ("0.5", "large")]
    assert [row["pretrained"] for row in results["synthetic"]] == ["small"] * 5 + ["large"] * 5
    names = ["0.5 small", "0.5 large", "0.3 large", "0.9 other"]
    assert [row["model"] for row in results["points"] if row["set"] == "blur"] == names
    out = run_command(capsys, *command(data, *given, "--table", model="0.5,small 0.5"))[1]
    assert {"0.5 small", "0.5 large"} < set(out.splitlines())


def test_outputs(data, capsys, tmp_path):
    files = {flag: tmp_path / f"{flag[2:]}.png" for flag in ("--plot", "--examples")}
    given = [*shifts(data), "--synthetic", "noise", "hue", "--baseline-model", "0.3", "0.6", "random"]
    given += [word for pair in files.items() for word in pair]
    code, out, err = run_command(capsys, *command(data, *given, "--table", "--json", tmp_path / "r", model="0.7 0.9"))
    assert code == 0, err
    results = json.loads((tmp_path / "r").read_text())
    row = results["models"][0]["robustness"]["some"]
    lines = [line.split() for line in out.splitlines()]
    assert ["some", "3", f"{row['base']:.1%}"] in [line[:3] for line in lines]
    assert next(line[-1] for line in lines if line[:1] == ["some"]) == f"{row['effective']:+.1%}"
    noise = [f"{row['metrics']['acc1']:.1%}" for row in results["synthetic"] if row["shift"] == "noise"]
    assert ["noise", *noise[:5]] in lines
    assert ["noise", *noise[5:]] in lines
    for path in files.values():
        assert Image.open(path).size[0] > 500


def test_a_picture_of_accuracies_of_0_and_1(data, capsys, tmp_path):
    given = ["--shift", f"some={data}/some", "--synthetic", "blur", "--plot", tmp_path / "p.svg"]
    evaluated(capsys, *command(data, *given))
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.999), (0.81, 0.87), (0.2, 0.21), (0.9985, 0.9991), (0.3, 0.6)])
def test_scales_have_numbers_wherever_they_lie(low, high):
    from clipfast.evaluation.tasks.robustness_plot import _ticks

    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 19
    assert low <= min(ticks) < max(ticks) <= high


def test_a_run_that_was_killed_goes_on(data, capsys, tmp_path, monkeypatch):
    given = ["--shift", f"some={data}/some", "--synthetic", "noise", "blur", "--batch-size", 64]
    expected, _ = evaluated(capsys, *command(data, *given, model="0.6 0.9"))
    arguments = command(data, *given, "--features", tmp_path, model="0.6 0.9")
    calls, original = [], ByColour.images

    def counted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 30:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(ByColour, "images", counted)
    assert run_command(capsys, *arguments)[0] != 0
    assert len(calls) == 30
    assert evaluated(capsys, *arguments)[0] == expected
    blocks = 2 * (4 + 2 + 10 * 4)  # of the base, of the shift, and of the base under synthetic ones, by two models
    assert blocks < len(calls) <= blocks + 20  # where it was killed, a block of all shifts was lost
    in_all = len(calls)
    assert evaluated(capsys, *arguments)[0] == expected
    assert len(calls) == in_all
    monkeypatch.setitem(AMOUNTS, "noise", (0.01, *AMOUNTS["noise"][1:]))
    evaluated(capsys, *arguments)
    assert len(calls) > in_all  # what is kept is not taken for that of another strength


def test_features_under_synthetic_shifts_are_let_go_after_each_pass(data, capsys, monkeypatch):
    arguments = command(data, "--synthetic", "noise", "blur", model="0.6 0.9")
    expected, _ = evaluated(capsys, *arguments)
    original, made, held = robustness.encoded_by, [], []

    def counted(*given, **options):
        held.append(sum(one() is not None for one in made))
        found = original(*given, **options)
        made.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(robustness, "encoded_by", counted)
    features, images = 2 * 210 * len(NAMES) * 4, 256 * 3 * 4  # bytes: by two models, and what they take
    monkeypatch.setattr(robustness, "AT_ONCE", 3 * (2 * features + images))
    assert evaluated(capsys, *arguments)[0] == expected
    assert held == [0, 2, 2, 2, 2]  # those of the base only, before each of four passes
    assert len(made) == 2 + 2 * 10


def as_rank(rank, size, arguments):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, rank, size, size)), strict=True)))
    from clipfast.evaluation import encoder

    encoder.Encoder = ByColour
    return main(arguments)


@pytest.mark.long
@pytest.mark.parametrize("block", [16, 512], ids=["uneven", "ranks without images"])
def test_three_ranks_equal_one_process(data, capsys, tmp_path, block):
    given = [*shifts(data), "--synthetic", "noise", "occlusion", "--baseline-model", "0.3", "0.6"]
    arguments = [str(word) for word in command(data, *given, "--batch-size", block, model="0.7")]
    expected, _ = evaluated(capsys, *arguments)
    path = tmp_path / "r.json"
    assert run_ranks(as_rank, 3, 3, [*arguments, "--json", str(path)], folder=tmp_path) == [0, 0, 0]
    assert json.loads(path.read_text()) == expected


WRONG = {
    "no shift": ([], "--shift or --synthetic is needed: what to compare with --data"),
    "no name": (["--shift", "{data}/all"], "--shift must be a name and a source, such as --shift imagenet-r=FOLDER"),
    "twice": (["--shift", "a={data}/all", "--shift", "a={data}/some"], "--shift a is given twice"),
    "taken name": (["--shift", "blur={data}/all"], "--shift blur: results have that name for something else"),
    "no such set": (["--shift", "a={data}/nowhere"], "nowhere"),
    "unknown label": (["--shift", "a={data}/unknown"], "a has 1 labels that the base lacks, such as 'umber'"),
    "own numbers": (["--shift", "a={data}/numbered"], "a has classes 0 to 1, which seem to be numbered by a list of"),
    "map of no shift": (["--synthetic", "--class-map", "a={data}/map.json"], "--class-map a has no --shift of"),
    "no map": (["--shift", "a={data}/all", "--class-map", "a={data}/none"], "there is no file {data}/none"),
    "no class in map": (
        ["--shift", "a={data}/mixed", "--class-map", "a={tmp}/m.json"],
        "class map of a: 'cold' is 'umber', which is no class of the base",
    ),
    "objectnet": (["--shift", "objectnet={data}/all"], "there is no folder {data}/all/images: --shift objectnet="),
    "synthetic": (["--synthetic", "fog"], "shift must be one of blur, noise, jpeg, hue, rotation, occlusion, got"),
    "examples": (["--shift", "a={data}/all", "--examples", "{tmp}/x.png"], "--examples draws synthetic shifts: give"),
    "model twice": (["--synthetic", "--baseline-model", "0.5", "0.5"], "results of 0.5 and 0.5 would have the same"),
    "short baseline": (
        ["--shift", "a={data}/all", "--baseline", "{data}/one.csv"],
        "the baseline of a has 1 models with accuracies between 0 and 1: a line needs at least two",
    ),
    "baseline of a mean": (
        ["--shift", "a={data}/all", "--baseline", "{data}/average.csv"], "average.csv has no points of a",
    ),
    "other baseline": (["--shift", "a={data}/all", "--baseline", "{data}/points.csv"], "points.csv has no points of a"),
    "names": (["--synthetic", "blur", "--classnames", "imagenet"], "1000 class names for 7 classes"),
    "plot": (["--synthetic", "blur", "--plot", "{tmp}/x.txt"], "the name must end in one of ."),
    "examples of no format": (["--synthetic", "--examples", "{tmp}/x.txt"], "--examples {tmp}/x.txt: the name must"),
    "examples nowhere": (["--synthetic", "--examples", "{tmp}/no/x.png"], "no folder {tmp}/no to write x.png in"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, data, capsys, tmp_path):
    (tmp_path / "m.json").write_text('{"cold": "umber", "warm": [], "odd": []}')
    arguments, message = WRONG[name]
    code, out, err = run_command(capsys, *command(data, *(word.format(data=data, tmp=tmp_path) for word in arguments)))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("clipfast eval: error: ")
    assert message.format(data=data, tmp=tmp_path) in last
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize("kind", ["tar", "csv", "parquet"])
def test_a_shifted_set_of_any_format_is_judged_alike(kind, data, capsys, tmp_path):
    expected, _ = evaluated(capsys, *command(data, "--shift", f"s={data}/some", model="0.6"))
    paths = sorted((data / "some").glob("*/*.png"))
    if kind == "tar":
        write_shard(tmp_path / "s.tar", [{"png": p.read_bytes(), "txt": p.parent.name.encode()} for p in paths])
    elif kind == "csv":
        lines = ["filepath\ttitle", *(f"{path}\t{path.parent.name}" for path in paths)]
        (tmp_path / "s.csv").write_text("\n".join(lines) + "\n")
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"image": [path.read_bytes() for path in paths], "caption": [path.parent.name for path in paths]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "s.parquet")
    found, _ = evaluated(capsys, *command(data, "--shift", f"s={tmp_path}/s.{kind}", model="0.6"))
    assert found["models"] == expected["models"]
    assert found["sets"][0]["metrics"] == expected["sets"][0]["metrics"]
