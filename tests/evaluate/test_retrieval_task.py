"""``clipfast eval retrieval``: CLIP_benchmark's recall by its definition, any number of captions, and wrong inputs."""

import json

import pytest
import torch
import torch.nn.functional as F

from clipfast.evaluate.retrieval import caption_recalls

from ..small_runs import picture, sample, write_shard
from .eval_commands import check_refused, printed, split


def restated(scores, owner, k):
    """Return retrieval recall in both directions by its definition, from scores [N captions, M images]."""
    by_caption = [own in row for own, row in zip(owner.tolist(), scores.topk(k, 1).indices.tolist(), strict=True)]
    best = scores.T.topk(k, 1).indices
    by_image = [(owner[row] == image).any().item() for image, row in enumerate(best)]
    return sum(by_caption) / len(by_caption), sum(by_image) / len(by_image)


def draw(images, most, noise=0.5, width=12):
    """Draw features of images and of their captions, to compute retrieval recall."""
    counts = torch.randint(1, most + 1, (images,))
    owner = torch.repeat_interleave(torch.arange(images), counts)
    features = F.normalize(torch.randn(images, width), dim=-1)
    return features, F.normalize(features[owner] + noise * torch.randn(len(owner), width), dim=-1), owner


def recalls(features, texts, owner, k):
    """Return clipfast's retrieval recall of images by caption, and of captions by image."""
    metrics, _ = caption_recalls(features, texts, torch.bincount(owner).tolist(), [k])
    return tuple(metrics.values())


def test_recall_is_that_of_the_definition():
    for images, most in ((200, 1), (150, 7), (5, 40)):
        features, texts, owner = draw(images, most)
        for k in (1, 2, 5):
            expected = restated(texts @ features.T, owner, k)
            assert recalls(features, texts, owner, k) == pytest.approx(expected, abs=1e-12), (images, most, k)
            assert images == 5 or 0.05 < expected[0] < 0.95


def test_a_tie_counts_as_wrong():
    features, owner = F.normalize(torch.ones(6, 4), dim=-1), torch.arange(12) // 2
    assert recalls(features, features[owner], owner, 5) == (0.0, 0.0)
    # All scores are equal, so that the ten captions of other images rank ahead.
    assert recalls(features, features[owner], owner, 6) == (1.0, 0.0)


def several(index):
    """Return a sample of a retrieval set with one to four captions."""
    texts = [f"caption {number} of {index}" for number in range(1 + index % 4)]
    return {"png": picture(index), "json": json.dumps({"caption": texts}).encode()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a retrieval set of images with one to four captions each; two images are equal, and one is broken."""
    folder = tmp_path_factory.mktemp("data")
    again = {"png": picture(0), "json": json.dumps({"caption": ["caption 0 of 1"]}).encode()}
    return write_shard(folder / "a.tar", [*map(several, range(40)), again, sample(0, png=b"broken")])


def test_the_command(model, data, tmp_path, capsys):
    words = "--k 2 1 2 41 --json {at}/r.json --plot {at}/p.svg --table"
    out, err = printed(capsys, "retrieval", *model, "--data", data, *split(words, at=tmp_path))
    found = json.loads((tmp_path / "r.json").read_text())
    expected = {"task": "zeroshot_retrieval", "images": 41, "captions": 101, "skipped_images": 1}
    assert found.items() >= expected.items()
    metrics = found["metrics"]
    assert list(metrics) == [f"{way}_retrieval_recall@{k}" for k in (1, 2, 41) for way in ("image", "text")]
    assert found["repeated"] == {"captions": 1, "images": 1}
    assert "1 captions and 1 images are there before" in err
    assert 0 < metrics["text_retrieval_recall@41"] < 1 == metrics["image_retrieval_recall@41"]
    for name, (low, high) in found["intervals"].items():
        assert low <= metrics[name] <= high, name
    assert [line.split()[0] for line in out.splitlines() if line] == ["41", "k", "1", "2", "41"]
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_images_without_captions_are_told(model, tmp_path, capsys):
    data = write_shard(tmp_path / "empty.tar", [{"png": picture(0), "json": b'{"caption": ["", " "]}'}])
    check_refused(capsys, tmp_path, "caption is empty", "retrieval", *model, "--data", data)
