"""``clipfast eval suite``: figures by their definitions, each image decoded once, and no result computed twice."""

import base64
import hashlib
import json
import math
import re
import shutil
from unittest import mock

import pytest
import torch

from clipfast.cli.tasks.suite import rows_of
from clipfast.evaluate import encoder as encoder_module
from clipfast.evaluate import offline_layout
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.offline_layout import find_sets
from clipfast.evaluate.pages import SORT, suite_page
from clipfast.evaluate.store import FeatureStore
from clipfast.evaluate.suite import Settings, evaluate_set, means
from clipfast.evaluate.suite_scores import PROBING, RETRIEVING, ZERO_SHOT, average_precision, headlines

from ..processes import run_ranks
from ..small_runs import output_of, run_command, write_shard
from .benchmark_sets import clueless, coded, perfect, write_set
from .eval_commands import as_rank, check_refused, save_model, split, wrong_inputs

CLASSES = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a CLIP_benchmark set of each kind for a suite, and an incomplete one."""
    root = tmp_path_factory.mktemp("root")
    write_set(root / "wds_vtab-cifar10", classes=CLASSES, splits=("test", "train", "val"), draw=coded)
    write_set(root / "wds_flickr8k", kind="retrieval", images=17, draw=coded)
    write_set(root / "wds_voc2007_multilabel", kind="multilabel", images=11, draw=coded)
    (write_set(root / "wds_mnist", images=2, draw=coded) / "classnames.txt").unlink()
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the values of ``--model`` that name the two models of a suite."""
    folder = tmp_path_factory.mktemp("models")
    return [",".join(save_model(folder / f"{seed}.pt", seed)[1::2]) for seed in (0, 1)]


def arguments(root, models, output, *more):
    """Return the arguments of ``clipfast eval suite`` for these models."""
    flags = ["--probe", "--solver", "torch", "--batch-size", 8]
    return ["eval", "suite", "--root", root, "--model", *models, "--output", output, *flags, *more]


def contents(folder):
    """Return the results of a suite's sets, which are JSON files in a folder, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def figures(root, encoders, **settings):
    """Compute the metrics of a suite, by set, task and model."""
    given = Settings(probe=True, **settings)
    found = {}
    for one in find_sets(root, ["vtab/cifar10", "flickr8k", "voc2007_multilabel"]).sets:
        wanted = {task: list(range(len(encoders))) for task in given.tasks_of(one)}
        for done in evaluate_set(one, encoders, wanted, given):
            assert done.reason is None, done.reason
            found[one.name, done.task, done.model] = done.score.metrics
    return found


def test_a_perfect_model_is_always_right(root):
    one_class = figures(root, [perfect(lambda number: {number % CLASSES})])
    assert set(one_class["vtab/cifar10", ZERO_SHOT, 0].values()) == {1.0}
    probe = one_class["vtab/cifar10", PROBING, 0]
    assert {probe[f"lp_{name}"] for name in ("acc1", "acc5", "mean_per_class_recall")} == {1.0}
    two = figures(root, [perfect(lambda number: {number % CLASSES, (number + 2) % CLASSES})])
    assert two["voc2007_multilabel", ZERO_SHOT, 0] == {"mean_average_precision": 1.0}
    each = figures(root, [perfect(lambda number: {number})], ks=(1, 5))
    assert set(each["flickr8k", RETRIEVING, 0].values()) == {1.0}


def test_average_precision_is_that_of_its_definition():
    features, classifier = torch.randn(40, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    rows = torch.rand(40, 5) < 0.3
    rows[:, 4] = False
    found = average_precision(features, rows, classifier)
    for column in range(4):
        order = (features @ classifier)[:, column].argsort(descending=True).tolist()
        hits = [place for place, image in enumerate(order, 1) if rows[image, column]]
        assert found[column].item() == pytest.approx(sum((i + 1) / place for i, place in enumerate(hits)) / len(hits))
    assert found[4] == 0


def test_all_models_see_each_image_once_and_texts_are_encoded_once(tmp_path, monkeypatch):
    for name in ("imagenet1k", "imagenetv2"):
        write_set(tmp_path / f"wds_{name}", splits=("test", "train"), images=10, draw=coded)
    counts = []
    for module, name in ((offline_layout, "decode_image"), (encoder_module, "encode_texts")):
        counts.append(mock.Mock(side_effect=getattr(module, name)))
        monkeypatch.setattr(module, name, counts[-1])
    encoders, store = [clueless(seed) for seed in range(3)], FeatureStore(tmp_path / "kept")
    wanted = {ZERO_SHOT: [0, 1, 2], PROBING: [2, 0]}
    for one in find_sets(tmp_path).sets:
        done = evaluate_set(one, encoders, wanted, Settings(probe=True), store)
        assert [(x.task, x.model) for x in done if x.score] == [(task, n) for task in wanted for n in wanted[task]]
    # The two sets have the same class names, so their prompts are encoded once.
    assert [count.call_count for count in counts] == [2 * (10 + 10), 3]


def test_the_command_writes_what_clip_benchmark_would(root, models, tmp_path, capsys):
    outputs = split("--json {at}/all.json --plot {at}/p.png --html {at}/p.html --table", at=tmp_path)
    code, out, err = run_command(capsys, *arguments(root, models, tmp_path / "out", *outputs))
    assert code == 1, err  # the exit code is 1, since one set is incomplete
    assert "37 sets are not there: imagenet1k, " in err
    assert "left out mnist: classnames.txt is missing" in err
    found = contents(tmp_path / "out")
    assert len(found) == 8
    probe = found["vtab_cifar10_1.pt_ViT-T-8-32_en_linear_probe.json"]
    about = {"dataset": "wds/vtab/cifar10", "task": PROBING, "language": "en"}
    assert probe.items() >= {**about, **dict(zip(("model", "pretrained"), models[1].split(","), strict=True))}.items()
    assert probe["metrics"].keys() >= {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "fewshot_k", "normalized"}
    assert probe["images"] == probe["train_images"] == probe["validation_images"] == 31
    assert f"flickr8k_0.pt_ViT-T-8-32_en_{RETRIEVING}.json" in found
    summary = json.loads((tmp_path / "all.json").read_text())
    assert sorted(map(json.dumps, summary["results"])) == sorted(map(json.dumps, found.values()))
    assert f"{probe['metrics']['lp_acc1']:.1%} (" in out
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    check_page((tmp_path / "p.html").read_text(), summary)


def check_page(page, summary):
    """Check that a suite's page loads nothing, runs only the script that its policy allows, and shows every metric."""
    assert not re.search(r"https?://|<link|<iframe", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script == SORT
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    for result in summary["results"]:
        for metric in result["intervals"]:
            assert f'data-value="{result["metrics"][metric]}"' in page, metric
    assert "Left out: mnist" in page


def test_names_on_the_page_are_text():
    hostile = "<script>alert('x')</script>"
    named = dict.fromkeys(("model", "pretrained", "dataset"), hostile)
    figures = {"metrics": {"acc1": 0.5, "acc5": None}, "intervals": {"acc1": (0.25, 0.75), "acc5": None}}
    results = dict.fromkeys(("root", "split"), hostile) | {
        "models": [named, {"model": "b", "pretrained": ""}], "means": [], "missing": [hostile],
        "results": [{**named, **figures, "task": ZERO_SHOT, "images": 4}],
        "problems": [dict.fromkeys(("name", "reason"), hostile)],
    }  # fmt: skip
    page = suite_page(results, [], rows_of(results, every=True))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(") >= 6
    assert page.count('<td data-value="-1.0">-</td>') == 3  # the table has no acc5, and no results of the second model


@pytest.mark.long
def test_what_is_done_is_not_done_again(root, models, tmp_path, capsys, monkeypatch):
    output, copied = tmp_path / "out", tmp_path / "root"
    shutil.copytree(root, copied)
    run_command(capsys, *arguments(copied, models[:1], output))
    calls, original = [], Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda self, pixels: calls.append(self.pretrained) or original(self, pixels))
    out = run_command(capsys, *arguments(copied, models[:1], output))[1]
    assert (calls, len(json.loads(out)["results"])) == ([], 4)
    # With a second model, the suite does not encode images by the first one again.
    run_command(capsys, *arguments(copied, models, output))
    assert set(calls) == {models[1].partition(",")[2]}
    # Only results that depend on a change are computed again: the change is of a result's file, prompts, data, or k.
    probe = f"vtab_cifar10_0.pt_ViT-T-8-32_en_{PROBING}.json"
    captions = f"flickr8k_0.pt_ViT-T-8-32_en_{RETRIEVING}.json"
    (output / probe).write_text("{")
    (output / captions).write_text("[]")
    assert changed(copied, models[:1], output, capsys) == {probe, captions}
    (copied / "wds_vtab-cifar10" / "zeroshot_classification_templates.txt").write_text("one {c}\n")
    write_shard(copied / "wds_voc2007_multilabel" / "test" / "0.tar", [])
    names = changed(copied, models[:1], output, capsys, "--k", "1", "3")
    assert {name.partition("_0.pt")[0] for name in names} == {"vtab_cifar10", "voc2007_multilabel", "flickr8k"}
    assert "recall@3" in (output / captions).read_text()


def changed(root, models, output, capsys, *more):
    """Run a suite again, and return the names of the result files that it has written anew; there must be any."""
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    run_command(capsys, *arguments(root, models, output, *more))
    names = {path.name for path in output.iterdir() if before.get(path) != path.stat().st_mtime_ns}
    assert names
    return names


def test_one_set_or_model_that_fails_does_not_stop_the_others(root, models, tmp_path, capsys, monkeypatch):
    copied = tmp_path / "root"
    shutil.copytree(root, copied)
    (copied / "wds_vtab-cifar10" / "classnames.txt").write_text("a\nb\nc\nd\ne\nf\n")
    for shard in ("0.tar", "1.tar"):
        write_shard(copied / "wds_flickr8k" / "test" / shard, [{"webp": b"broken", "txt": b"a"}] * 8)
    original = Encoder.images

    def broken(self, pixels):
        """Return features that are not finite for the second model of a suite."""
        return original(self, pixels) * (math.nan if self.pretrained.endswith("1.pt") else 1)

    monkeypatch.setattr(Encoder, "images", broken)
    code, out, err = run_command(capsys, *arguments(copied, models, tmp_path / "out"))
    assert code == 1
    assert list(contents(tmp_path / "out")) == ["voc2007_multilabel_0.pt_ViT-T-8-32_en_zeroshot_classification.json"]
    problems = json.loads(out)["problems"]
    for name, reason in (
        ("vtab/cifar10", f"{PROBING} by ViT-T-8-32 0.pt: classnames.txt has 6 names, but the class of image 6 is 6 "),
        ("voc2007_multilabel", f"{ZERO_SHOT} by ViT-T-8-32 1.pt: zero-shot classification: features contain NaN"),
        ("flickr8k", "not one of the first 16 images"),
    ):
        assert any(found["name"] == name and found["reason"].startswith(reason) for found in problems), name
        assert f"left out {name}: {reason}" in err


def test_means_are_of_the_sets_that_all_models_have():
    results = [
        {"dataset": name, "model": model, "pretrained": "", "task": ZERO_SHOT, "metrics": {"acc1": value}}
        for name, model, value in (("x", "a", 0.5), ("y", "a", 0.7), ("z", "a", 1), ("x", "b", 0.25), ("y", "b", 0.75))
    ]
    (found,) = means(results, [("a", ""), ("b", "")])
    assert (found["metric"], found["sets"], found["values"]) == ("acc1", 2, [pytest.approx(0.6), 0.5])
    assert means(results[-1:], [("a", ""), ("b", "")]) == []
    assert headlines(RETRIEVING, {"text_retrieval_recall@10": 0, "text_retrieval_recall@5": 0})[0].endswith("@5")


@pytest.mark.long
def test_ranks_equal_one_process(root, models, tmp_path, capsys):
    chosen = ("--sets", "flickr8k", "voc2007_multilabel", "--batch-size", "1", "--device", "cpu")
    ranks, whole = (list(map(str, arguments(root, models, tmp_path / x, *chosen))) for x in ("r", "w"))
    output_of(capsys, *whole)
    assert [code for ((code, *_),) in run_ranks(as_rank, 3, 3, [ranks], folder=tmp_path)] == [0, 0, 0]
    assert contents(tmp_path / "r") == contents(tmp_path / "w")
    assert len(contents(tmp_path / "w")) == 4


WRONG = {
    "--root nowhere": "--root nowhere: there is no such folder",
    "--sets cifar11": "none of the sets cifar11; it has flickr8k, mnist, voc",
    "--model a/w.pt,x a_w.pt,x": "a/w.pt x and a_w.pt x",
    "--output {root}/wds_flickr8k/dataset_type.txt": "is a file, not a folder",
    "--output nowhere/a": "no folder nowhere to make a in",
    "--output {tmp} --json {tmp}/all.json": "clip_benchmark build takes every .json",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, root, models, tmp_path, capsys):
    given = ["suite", "--root", root, "--model", models[0], "--output", tmp_path / "out"]
    check_refused(capsys, tmp_path, message, *given, words=words, root=root)
