"""``clipfast eval zeroshot``: CLIP_benchmark's figures by their definitions, intervals, pages, and wrong inputs."""

import base64
import io
import json
import math
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast import create_model
from clipfast.evaluation.classification import Classified, classify, intervals, metrics, recalls, worst_classes
from clipfast.evaluation.intervals import bootstrap, percent, wilson

from .conftest import picture, run_command, sample, write_shard

NAMES = ("acc1", "acc5", "mean_per_class_recall")


def restated(scores, classes):
    """The figures by their definitions, from the whole matrix of scores [N, C]."""
    order = scores.argsort(1, descending=True)
    hits = [[c in row[:k] for row, c in zip(order.tolist(), classes.tolist(), strict=True)] for k in (1, 5)]
    by_class = {}
    for hit, c in zip(hits[0], classes.tolist(), strict=True):
        by_class.setdefault(c, []).append(hit)
    recall = sum(sum(some) / len(some) for some in by_class.values()) / len(by_class)
    return sum(hits[0]) / len(classes), sum(hits[1]) / len(classes), recall


def draw(images=500, classes=23, width=8):
    labels = torch.randint(classes - 1, (images,))  # the last class has no images
    weights = F.normalize(torch.randn(width, classes), dim=0)
    features = F.normalize(weights.T[labels] + torch.randn(images, width), dim=-1)
    names = [f"class {number:02}" for number in range(classes)]
    return features, labels, names, weights


def test_figures_are_those_of_the_definitions():
    features, labels, names, weights = draw()
    found = classify(features, [names[c] for c in labels], names, weights, block=64)
    assert [metrics(found)[name] for name in NAMES] == pytest.approx(restated(features @ weights, labels), abs=1e-12)
    own = (features @ weights).gather(1, labels[:, None])
    assert torch.equal(found.ahead, ((features @ weights) > own).sum(1))
    assert 0.1 < metrics(found)["acc1"] < metrics(found)["acc5"] < 0.99


def test_a_random_model_scores_chance_and_a_perfect_one_all():
    _, labels, names, weights = draw(4000)
    texts = [names[c] for c in labels]
    chance = metrics(classify(F.normalize(torch.randn(4000, 8), dim=-1), texts, names, weights))
    for name, expected in zip(NAMES, (1 / 23, 5 / 23, 1 / 23), strict=True):
        assert abs(chance[name] - expected) < 5 * math.sqrt(expected / 4000), name
    assert set(metrics(classify(weights.T[labels], texts, names, weights)).values()) == {1.0}


def test_with_fewer_than_five_classes_there_is_no_acc5():
    found = classify(torch.eye(3), ["a", "b", "a"], ["a", "b", "c"], torch.eye(3))
    assert metrics(found) == {"acc1": 2 / 3, "acc5": None, "mean_per_class_recall": 0.75}
    assert intervals(found)["acc5"] is None
    assert percent(None, None) == "-"


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="features contain NaN or infinity"):
        classify(torch.full((2, 3), math.nan), ["a", "b"], ["a", "b"], torch.randn(3, 2))
    with pytest.raises(ValueError, match="1 class names for 2 classes"):
        classify(torch.eye(3), ["a"], ["a", "b"], torch.randn(3, 1))


def test_wilson_solves_its_equation():
    # the ends are the shares from which the one that was seen is as far as 1.96 standard errors
    for hits, count in ((3, 10), (50, 60), (1, 1000)):
        for end in wilson(hits, count):
            assert abs(hits / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-5)
    assert wilson(0, 20)[0] == 0.0 < wilson(0, 20)[1] < 0.2
    assert wilson(20, 20)[1] == 1.0


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = torch.zeros(2)
    for _ in range(40):
        right = torch.rand(200) < 0.3
        best = (torch.arange(200) + ~right)[:, None]
        found = Classified([str(n) for n in range(200)], torch.arange(200), best, torch.zeros(200))
        for place, name in enumerate(("acc1", "mean_per_class_recall")):
            low, high = intervals(found)[name]
            inside[place] += low <= 0.3 <= high
    assert (inside >= 33).all(), inside
    assert (inside < 40).any()


def test_bootstrap_is_the_same_each_time():
    hits, trials = torch.rand(2, 9)
    assert bootstrap(hits, trials) == bootstrap(hits, trials)
    assert bootstrap(trials, trials) == (1.0, 1.0)


def test_worst_classes_and_what_they_were_taken_for():
    best = torch.tensor([[0], [1], [1], [2], [0], [0], [2]])
    found = Classified(["a", "b", "c"], torch.tensor([0, 0, 0, 1, 2, 2, 2]), best, torch.tensor([0, 1, 2, 2, 2, 2, 0]))
    assert recalls(found).tolist() == pytest.approx([1 / 3, 0, 1 / 3])
    assert worst_classes(found, 2) == [
        {"class": "b", "images": 1, "recall": 0.0, "mean_place": 3.0, "taken_for": {"c": 1}},
        {"class": "c", "images": 3, "recall": 1 / 3, "mean_place": 1 + 4 / 3, "taken_for": {"a": 2}},
    ]
    assert len(worst_classes(found, 9)) == 3


HOSTILE = "<script>alert('x')</script>&"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "w.pt"
    torch.save(create_model("ViT-T-8-32").state_dict(), path)
    return ["--model", "ViT-T-8-32", "--pretrained", str(path)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven classes, of which one would run in a page; one image is broken."""
    folder = tmp_path_factory.mktemp("data")
    texts = [HOSTILE if index % 7 == 0 else f"thing {index % 7}" for index in range(30)]
    samples = [sample(index, txt=text.encode()) for index, text in enumerate(texts)]
    return write_shard(folder / "a.tar", [*samples, sample(0, png=b"broken")])


@pytest.mark.long
def test_everything_at_once(model, data, tmp_path, capsys):
    outputs = ["--json", tmp_path / "r.json", "--html", tmp_path / "p.html", "--plot", tmp_path / "p.png"]
    arguments = ["eval", "zeroshot", *model, "--data", data, "--templates", "simple", "--features", tmp_path / "f"]
    code, out, err = run_command(capsys, *arguments)
    assert code == 0, err
    assert "left out a.tar/030: not an image" in err
    plain = json.loads(out)
    assert (plain["task"], plain["dataset"], plain["language"]) == ("zeroshot_classification", str(data), "en")
    assert (plain["images"], plain["skipped_images"], plain["classes"], plain["templates"]) == (30, 1, 7, "simple")
    assert plain["metrics"]["acc1"] == plain["zero_shot"]["top1"]  # no two images are equal
    assert plain["metrics"]["acc5"] == plain["zero_shot"]["top5"]
    code, out, err = run_command(capsys, *arguments, "--compare-templates", "--table", "--worst", 3, *outputs)
    assert code == 0, err
    full = json.loads((tmp_path / "r.json").read_text())
    by_templates = full.pop("by_templates")
    assert {key: found["templates"] for key, found in by_templates.items()} == {"plain": 1, "simple": 7, "openai": 80}
    assert by_templates["simple"]["metrics"] == full["metrics"]
    assert full["worst_classes"] == plain.pop("worst_classes")[:3]
    assert full.items() >= plain.items()
    rows = [line.split()[0] for line in out.splitlines() if line]
    assert rows[:5] == ["30", "templates", "plain", "simple", "openai"]
    assert f"{full['metrics']['acc1']:.1%} (" in out
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    check_page((tmp_path / "p.html").read_text(), full)


@pytest.mark.parametrize("count", [5, 12])
def test_groups_and_chance_are_shown_and_nothing_of_classes_with_one_image_each(count, model, tmp_path, capsys):
    from clipfast.evaluation import pictures

    texts = [f"thing {index % 6}" for index in range(count)]
    data = write_shard(tmp_path / "a.tar", [sample(index, txt=text.encode()) for index, text in enumerate(texts)])
    outputs = ["--table", "--json", tmp_path / "r.json", "--plot", tmp_path / "p.png"]
    arguments = ["eval", "zeroshot", *model, "--data", data, "--group-by", "category", "--leave-out", "odd", *outputs]
    with mock.patch.object(pictures, "save_figure", wraps=pictures.save_figure) as saved:
        code, out, err = run_command(capsys, *arguments)
    assert code == 0, err
    found, rows = json.loads((tmp_path / "r.json").read_text()), [line.split() for line in out.splitlines()]
    for name, one in (*found["by_group"].items(), ("all", found["zero_shot"])):
        low, high = (100 * end for end in wilson(round(one["top1"] * one["images"]), one["images"]))
        interval = f"({low:.1f}-{high:.1f})"
        assert [name, str(one["images"]), f"{one['top1']:.1%}", interval, f"{one['top5']:.1%}"] in rows
    assert any(row[:2] == ["without", "odd"] for row in rows)
    assert (["worst", "classes"] in [row[:2] for row in rows]) == (count > 6)
    (figure,) = (call.args[0] for call in saved.call_args_list)
    bars, groups, *curves = figure.axes
    assert [label.get_text() for label in groups.get_yticklabels()] == [
        f"{name} ({found['by_group'][name]['images']})" for name in ("even", "odd")
    ]
    assert len(curves) == (count > 6)
    chance = 100 / found["classes"]
    assert any(line.get_xdata()[0] == pytest.approx(chance) for line in groups.get_lines())
    assert all(any(line.get_ydata()[0] == pytest.approx(chance) for line in axis.get_lines()) for axis in curves)
    heights = [segment[0, 1] for lines in bars.collections for segment in getattr(lines, "get_segments", list)()]
    assert sum(height == pytest.approx(chance) for height in heights) >= 2


def check_page(page, results):
    """It runs nothing, loads nothing, and shows images that can be decoded."""
    assert not re.search(r"<script|https?://|<link|<iframe", page)
    assert "default-src 'none'" in page
    shown = {name for row in results["worst_classes"] for name in (row["class"], *row["taken_for"])}
    assert HOSTILE in shown  # or else the page was not tested
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;" in page
    sources = re.findall(r'<img src="(.*?)"', page)
    assert len(sources) == page.count("<figure") > 3
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (24, 24)
    assert len(re.findall(r"<h2>", page)) == len(results["worst_classes"])


WRONG = {
    "no model": (["--data", "{data}"], "--model or --watch is needed"),
    "html": (["--html", "nowhere/p.html"], "no folder nowhere to write p.html in"),
    "html is a folder": (["--html", "{tmp}"], "{tmp} exists already: give another name"),
    "plot": (["--plot", "{tmp}/p.txt"], "--plot {tmp}/p.txt: the name must end in one of ."),
    "no label": (["--label-by", "breed"], "sample has no 'breed' in its json"),
    "no group": (["--leave-out", "odd"], "cannot leave out odd; groups are: none"),
    "templates": (["--templates", "{tmp}/t.txt"], "template 'a photo' in {tmp}/t.txt has no {{}} for the class name"),
    "no templates": (["--templates", "nowhere.txt"], "--templates must be one of plain, simple, openai or a file"),
    "empty templates": (["--templates", "{tmp}/empty.txt"], "{tmp}/empty.txt is empty"),
    "names": (["--classnames", "{tmp}/t.txt"], "2 class names for 7 classes"),
    "empty class": (["--data", "{tmp}/classes"], "{tmp}/classes/none has no images (jpg"),
    "watch": (["--watch", "{tmp}", "--features", "{tmp}"], "--watch cannot be used with --features"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, model, data, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a {}\na photo\n")
    (tmp_path / "empty.txt").write_text("\n")
    for folder in ("some", "none"):
        (tmp_path / "classes" / folder).mkdir(parents=True)
    (tmp_path / "classes" / "some" / "x.png").write_bytes(picture(0))
    arguments, message = WRONG[name]
    arguments = [word.format(tmp=tmp_path, data=data) for word in arguments]
    own = [] if name in ("no model", "watch") else model
    given = [] if "--data" in arguments else ["--data", data]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_command(capsys, "eval", "zeroshot", *own, *given, *arguments)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("clipfast eval: error: ")
    assert message.format(tmp=tmp_path) in last
    assert sorted(tmp_path.rglob("*")) == before
