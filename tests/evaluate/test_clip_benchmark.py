"""Equal to CLIP_benchmark's and OpenCLIP's own functions on the same weights and images, to the last count.

CLIP_benchmark is compared with if CLIP_BENCHMARK_SOURCE names a checkout of it, and scikit-learn is installed.
"""

import csv
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from clipfast import create_model, create_model_from_pretrained
from clipfast.evaluate.classification import classify, metrics
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.retrieval import caption_ranks
from clipfast.factory import get_tokenizer

from .benchmark_sets import write_set
from .eval_commands import printed, save_model

CLASSES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in ("cat", "dog", "cow", "bus")]
TEMPLATES = ("a photo of a {}.", "{}", "art of the {}.")


@pytest.fixture(scope="module")
def drawn():
    """A model, images in batches, the class of each, and captions: one to three of each image."""
    torch.manual_seed(0)
    model = create_model("ViT-T-8-32").eval()
    images = torch.randint(0, 256, (90, 3, 32, 32), dtype=torch.uint8)
    classes = torch.randint(len(CLASSES), (90,))
    words = ("picture", "drawing", "photo")
    texts = [[f"{word} number {image}" for word in words[: 1 + image % 3]] for image in range(90)]
    return Encoder("ViT-T-8-32", model, get_tokenizer("ViT-T-8-32"), None), images, classes, texts


def ours(encoder, images, classes, texts):
    """The figures by this package's functions."""
    labels = [CLASSES[number] for number in classes.tolist()]
    features = encoder.images(images)
    found = metrics(classify(features, labels, CLASSES, encoder.classifier(CLASSES, TEMPLATES)))
    owner = torch.tensor([image for image, some in enumerate(texts) for _ in some])
    by_image, by_caption = caption_ranks(features, encoder.texts([text for some in texts for text in some]), owner)
    for k in (1, 5, 10):
        found[f"image_retrieval_recall@{k}"] = (by_caption < k).double().mean().item()
        found[f"text_retrieval_recall@{k}"] = (by_image < k).double().mean().item()
    return found


def checkout(*packages):
    """The folder of CLIP_benchmark, which needs some packages."""
    source = os.environ.get("CLIP_BENCHMARK_SOURCE")
    if not source:
        pytest.skip("CLIP_BENCHMARK_SOURCE does not name a checkout of CLIP_benchmark")
    for package in packages:
        pytest.importorskip(package)
    return source


@pytest.fixture
def command(monkeypatch):
    """CLIP_benchmark's command, with a model of ours or of OpenCLIP in place of those that it downloads."""
    monkeypatch.syspath_prepend(checkout("sklearn", "webdataset", "requests", "pycocoevalcap"))
    cli = importlib.import_module("clip_benchmark.cli")
    monkeypatch.setattr(cli.zeroshot_classification, "float", number_of, raising=False)

    def run(load, *arguments):
        monkeypatch.setattr(cli, "load_clip", load)
        monkeypatch.setattr(sys, "argv", ["clip_benchmark", *map(str, arguments)])
        cli.main()

    return run


def loaded_from(of):
    """Return a replacement for CLIP_benchmark's function that loads a model."""

    def load(model_name, pretrained, **_):
        model, transform = create_model_from_pretrained(model_name, pretrained)
        if of == "clipfast":
            return model, transform, get_tokenizer(model_name)
        open_clip = pytest.importorskip("open_clip")
        theirs = with_open_clip(Encoder("", model, None, None))
        return theirs.model, open_clip.image_transform(32, is_train=False), theirs.tokenizer

    return load


@pytest.mark.long
@pytest.mark.parametrize("of", ["clipfast", "open_clip"])
def test_the_suite_equals_clip_benchmark_run_as_itself(of, command, tmp_path, capsys):
    """Its command and ours, on the same folders; and it builds its table from our results."""
    write_set(tmp_path / "wds_vtab-cifar10", images=90, classes=9)
    write_set(tmp_path / "wds_flickr8k", images=90, kind="retrieval")
    write_set(tmp_path / "wds_voc2007_multilabel", images=90, classes=5, kind="multilabel")
    (tmp_path / "theirs").mkdir()
    named = save_model(tmp_path / "w.pt")
    for name in ("vtab/cifar10", "flickr8k", "voc2007_multilabel"):
        output = f"{tmp_path}/theirs/{{dataset}}_{{pretrained}}_{{model}}_{{language}}_{{task}}.json"
        data = ("--dataset", f"wds/{name}", "--dataset_root", f"{tmp_path}/wds_{{dataset_cleaned}}")
        options = ("--no_amp", "--quiet", "--num_workers", 0, "--recall_k", 1, 5, "--output", output)
        command(loaded_from(of), "eval", *data, *named, *options)
    printed(capsys, "suite", "--root", tmp_path, *named, "--output", tmp_path / "ours", "--k", 1, 5)
    theirs, ours = ({p.name: json.loads(p.read_text()) for p in (tmp_path / x).iterdir()} for x in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert len(theirs) == 3
    for name, expected in theirs.items():
        figures = expected.pop("metrics")
        assert ours[name]["metrics"] == pytest.approx(figures, abs=1e-6), name  # theirs are float32
        assert any(0 < value < 1 for value in figures.values())
        assert ours[name].items() >= expected.items()
    command(None, "build", tmp_path / "ours", "--output", tmp_path / "benchmark.csv")
    with (tmp_path / "benchmark.csv").open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    (cifar,) = (found for found in ours.values() if found["dataset"] == "wds/vtab/cifar10")
    assert float(rows["wds/vtab/cifar10"]["acc1"]) == cifar["metrics"]["acc1"]
    assert set(rows) == {"wds/vtab/cifar10", "wds/flickr8k", "wds/voc2007_multilabel"}


def number_of(value):
    """Replace ``float`` in CLIP_benchmark: arrays with one element are accepted, which newer NumPy refuses."""
    return float(getattr(value, "item", lambda: value)())


def with_open_clip(encoder):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.CLIP(**encoder.model.config.to_dict()).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    return Encoder("theirs", theirs, open_clip.get_tokenizer("ViT-B-32"), None)


def normalised(images):
    open_clip = pytest.importorskip("open_clip")
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (images.float() / 255 - mean) / std


def test_equal_to_open_clip(drawn, monkeypatch):
    """Its classifier, and its loop over images, with its model; our functions with ours, and with its model."""
    open_clip = pytest.importorskip("open_clip")
    zero_shot = pytest.importorskip("open_clip_train.zero_shot")
    monkeypatch.setattr(zero_shot, "float", number_of, raising=False)
    encoder, images, classes, texts = drawn
    theirs, pixels = with_open_clip(encoder), normalised(images)
    functions = [template.format for template in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(theirs.model, theirs.tokenizer, CLASSES, functions)
    args = SimpleNamespace(device="cpu", precision="fp32", rank=0, batch_size=32)
    batches = list(zip(pixels.split(32), classes.split(32), strict=True))
    run = getattr(zero_shot, "run_zero_shot_classifier", None) or zero_shot.run  # the function's name in OpenCLIP 3.3
    expected = run(theirs.model, weights, batches, args)
    for found in (ours(encoder, images, classes, texts), ours(theirs, pixels, classes, texts)):
        assert (found["acc1"], found["acc5"]) == expected
    assert 0 < expected[1] < 1
