"""``clipfast eval zeroshot``: CLIP_benchmark's figures by their definitions, intervals, pages, and wrong inputs."""

import html
import json
import math

import pytest
import torch
import torch.nn.functional as F

from clipfast.evaluate.classification import Classified, classify, intervals, metrics, recalls, worst_classes
from clipfast.evaluate.intervals import percent, wilson
from clipfast.models import get_model_config

from ..small_runs import sample, write_shard
from .eval_commands import check_page, check_refused, printed, split, wrong_inputs


def test_figures_are_those_of_the_definitions():
    labels = torch.randint(22, (500,))  # classes 0 to 21 have images, class 22 has none
    weights = F.normalize(torch.randn(8, 23), dim=0)
    features = F.normalize(weights.T[labels] + torch.randn(500, 8), dim=-1)
    names = [f"class {number:02}" for number in range(23)]
    found, scores = classify(features, [names[c] for c in labels], names, weights, block=64), features @ weights
    assert torch.equal(found.best, scores.topk(5).indices)
    ahead = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert torch.equal(found.ahead, ahead)
    recall = [(ahead[labels == c] < 1).double().mean().item() for c in labels.unique()]
    shares = [(ahead < k).double().mean().item() for k in (1, 5)]
    assert list(metrics(found).values()) == pytest.approx([*shares, sum(recall) / len(recall)], abs=1e-12)
    assert 0.1 < shares[0] < shares[1] < 0.99


def test_wilson_solves_its_equation():
    # At either end of Wilson's interval, the observed share is 1.96 standard errors away.
    for hits, count in ((3, 10), (50, 60), (1, 1000)):
        for end in wilson(hits, count):
            assert abs(hits / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-5)
    assert (wilson(0, 20)[0], wilson(20, 20)[1]) == (0.0, 1.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = {"acc1": 0, "mean_per_class_recall": 0}
    for _ in range(40):
        right = torch.rand(200) < 0.3
        best = (torch.arange(200) + ~right)[:, None]
        found = Classified([str(n) for n in range(200)], torch.arange(200), best, torch.zeros(200))
        for name in inside:
            low, high = intervals(found)[name]
            inside[name] += low <= 0.3 <= high
    assert 33 <= min(inside.values()) < 40, inside


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
def data(tmp_path_factory):
    """Write a shard of seven classes for zero-shot evaluation, one with HTML in its name; one image is broken."""
    folder = tmp_path_factory.mktemp("data")
    texts = [HOSTILE if index % 7 == 0 else f"thing {index % 7}" for index in range(30)]
    samples = [sample(index, txt=text.encode()) for index, text in enumerate(texts)]
    return write_shard(folder / "a.tar", [*samples, sample(0, png=b"broken")])


def test_a_model_by_the_json_file_of_open_clip(model, data, tmp_path, capsys):
    config = tmp_path / "ViT-custom.json"
    config.write_text(json.dumps(get_model_config(model[1]).to_dict()))
    expected, found = (
        json.loads(printed(capsys, "zeroshot", *words, *model[2:], "--data", data, "--templates", "plain")[0])
        for words in (model[:2], ["--model", config])
    )
    assert (found["model"], found["metrics"]) == (str(config), expected["metrics"])


@pytest.mark.long
def test_everything_at_once(model, data, tmp_path, capsys):
    given = ["zeroshot", *model, "--data", data, *split("--templates simple --features {at}/f", at=tmp_path)]
    out, err = printed(capsys, *given)
    assert "left out a.tar/030: not an image" in err
    plain = json.loads(out)
    assert (plain["task"], plain["images"], plain["skipped_images"]) == ("zeroshot_classification", 30, 1)
    # top1 accepts each label of equal images, and acc1 only the image's own; no images are equal here.
    assert plain["metrics"]["acc1"] == plain["zero_shot"]["top1"]
    more = "--compare-templates --table --worst 3 --json {at}/r.json --html {at}/p.html --plot {at}/p.png"
    out, _ = printed(capsys, *given, *split(more, at=tmp_path))
    full = json.loads((tmp_path / "r.json").read_text())
    by_templates = full.pop("by_templates")
    assert {key: found["templates"] for key, found in by_templates.items()} == {"plain": 1, "simple": 7, "openai": 80}
    assert by_templates["simple"]["metrics"] == full["metrics"]
    assert full["worst_classes"] == plain.pop("worst_classes")[:3]
    assert full.items() >= plain.items()
    assert all(text in out for text in (*by_templates, f"{full['metrics']['acc1']:.1%} ("))
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "p.html").read_text()
    check_page(page, page.count("<figure"), 24)
    shown = {name for row in full["worst_classes"] for name in (row["class"], *row["taken_for"])}
    assert HOSTILE in shown  # the page must show hostile text, or the next line would test nothing
    assert html.escape(HOSTILE) in page
    assert page.count("<h2>") == 3


def test_groups_are_shown_and_nothing_of_classes_with_one_image_each(model, tmp_path, capsys):
    data = write_shard(tmp_path / "a.tar", [sample(index, txt=f"thing {index}".encode()) for index in range(4)])
    words = "--group-by category --leave-out odd --table --json {at}/r.json"
    out, _ = printed(capsys, "zeroshot", *model, "--data", data, *split(words, at=tmp_path))
    found, rows = json.loads((tmp_path / "r.json").read_text()), [line.split() for line in out.splitlines()]
    odd = found["by_group"]["odd"]
    assert ["odd", "2", *percent(odd["top1"], wilson(round(2 * odd["top1"]), 2)).split(), f"{odd['top5']:.1%}"] in rows
    assert ["without", "odd"] in [row[:2] for row in rows]
    assert found["without"] == {"groups": ["odd"], "zero_shot": found["by_group"]["even"]}
    assert "worst classes" not in out
    # With fewer than five classes, there is no acc5.
    assert (found["metrics"]["acc5"], found["intervals"]["acc5"]) == (None, None)


WRONG = {
    "--html nowhere/p.html": "no folder nowhere to write p.html in",
    "--html {tmp}": "{tmp} exists already: give another name",
    "--plot {tmp}/p.txt": "--plot {tmp}/p.txt: the name must end in one of .",
    "--leave-out odd": "cannot leave out odd; groups are: none",
    "--group-by category --leave-out evne": "cannot leave out evne; groups are: even, odd",
    "--group-by category --leave-out odd even": "cannot leave out even, odd; groups are: even, odd",
    "--data {tmp}/none.tar": "{tmp}/none.tar holds no images",
    "--templates nowhere.txt": "--templates must be one of plain, simple, openai or a file",
    "--templates {tmp}/empty.txt": "{tmp}/empty.txt is empty",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, model, data, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    write_shard(tmp_path / "none.tar", [])
    check_refused(capsys, tmp_path, message, "zeroshot", *model, "--data", data, words=words)
