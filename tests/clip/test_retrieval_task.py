"""``clipfast eval retrieval``: CLIP_benchmark's recall by its definition, any number of captions, and wrong inputs."""

import contextlib
import io
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F

from clipfast import create_model, ranks
from clipfast.cli import main
from clipfast.evaluation.retrieval import caption_ranks
from clipfast.ranks import run_ranks

from .conftest import picture, run_command, sample, write_shard

ranks.PRELOAD.append("clipfast.evaluation.encoder")


def restated(scores, owner, k):
    """Recall of images by caption and of captions by image: one of the best k of the whole matrix [N, M] is right."""
    by_caption = [own in row for own, row in zip(owner.tolist(), scores.topk(k, 1).indices.tolist(), strict=True)]
    best = scores.T.topk(k, 1).indices
    by_image = [(owner[row] == image).any().item() for image, row in enumerate(best)]
    return sum(by_caption) / len(by_caption), sum(by_image) / len(by_image)


def draw(images, most, noise=0.5, width=12):
    counts = torch.randint(1, most + 1, (images,))
    owner = torch.repeat_interleave(torch.arange(images), counts)
    owner = owner[torch.randperm(len(owner))]  # captions need not lie together
    features = F.normalize(torch.randn(images, width), dim=-1)
    return features, F.normalize(features[owner] + noise * torch.randn(len(owner), width), dim=-1), owner


def recalls(features, texts, owner, k):
    by_image, by_caption = caption_ranks(features, texts, owner)
    return (by_caption < k).double().mean().item(), (by_image < k).double().mean().item()


def test_recall_is_that_of_the_definition():
    for images, most in ((200, 1), (150, 7), (5, 40)):
        features, texts, owner = draw(images, most)
        for k in (1, 2, 5):
            expected = restated(texts @ features.T, owner, k)
            assert recalls(features, texts, owner, k) == pytest.approx(expected, abs=1e-12), (images, most, k)
            assert images == 5 or 0.05 < expected[0] < 0.95


def test_recall_is_open_clips_where_an_image_has_one_caption():
    """The place of the right one in the order of each row of the matrix, as its training loop logs it."""
    features, texts, owner = draw(200, 1)
    texts = texts[owner.argsort()]
    scores = features @ texts.T
    for k in (1, 5, 10):
        places = [
            (x.argsort(1, descending=True) == torch.arange(200)[:, None]).int().argmax(1) for x in (scores.T, scores)
        ]
        expected = tuple((place < k).double().mean().item() for place in places)
        assert recalls(features, texts, torch.arange(200), k) == expected


def test_a_random_model_scores_chance_and_a_perfect_one_all():
    features, texts, owner = draw(1000, 5, noise=1e6, width=64)
    count, own = len(texts), torch.bincount(owner).tolist()
    for k in (1, 5, 10):
        by_caption = k / 1000
        by_image = sum(1 - math.comb(count - n, k) / math.comb(count, k) for n in own) / 1000
        for found, chance in zip(recalls(features, texts, owner, k), (by_caption, by_image), strict=True):
            assert abs(found - chance) < 5 * math.sqrt(chance / 1000)
    assert recalls(features, features[owner], owner, 1) == (1.0, 1.0)


def test_a_tie_counts_as_wrong():
    features, owner = F.normalize(torch.ones(6, 4), dim=-1), torch.arange(12) // 2
    assert recalls(features, features[owner], owner, 5) == (0.0, 0.0)
    assert recalls(features, features[owner], owner, 6) == (1.0, 0.0)  # ten other captions are ahead of an image


def test_features_that_are_no_numbers_are_refused():
    bad = torch.full((3, 4), math.nan)
    for images, texts in ((bad, torch.eye(3, 4)), (torch.eye(3, 4), bad)):
        with pytest.raises(ValueError, match="features contain NaN"):
            caption_ranks(images, texts, torch.arange(3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "w.pt"
    torch.save(create_model("ViT-T-8-32").state_dict(), path)
    return ["--model", "ViT-T-8-32", "--pretrained", str(path)]


def several(index):
    """A sample with one to four captions."""
    texts = [f"caption {number} of {index}" for number in range(1 + index % 4)]
    return {"png": picture(index), "json": json.dumps({"caption": texts}).encode()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 images with several captions each, of which the last is broken; two images and two captions are the same."""
    folder = tmp_path_factory.mktemp("data")
    again = {"png": picture(0), "json": json.dumps({"caption": ["caption 0 of 1"]}).encode()}
    return write_shard(folder / "a.tar", [*map(several, range(40)), again, sample(0, png=b"broken")])


def test_the_command(model, data, tmp_path, capsys):
    outputs = ["--json", tmp_path / "r.json", "--plot", tmp_path / "p.svg", "--table"]
    code, out, err = run_command(
        capsys, "eval", "retrieval", *model, "--data", data, "--k", 2, 1, 2, 41, *outputs, "--features", tmp_path / "f"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["task"], found["images"], found["captions"], found["skipped_images"]) == (
        "zeroshot_retrieval",
        41,
        101,
        1,
    )
    assert list(found["metrics"]) == [f"{way}_retrieval_recall@{k}" for k in (1, 2, 41) for way in ("image", "text")]
    assert found["repeated"] == {"captions": 1, "images": 1}
    assert "1 captions and 1 images are there before" in err
    assert found["metrics"]["image_retrieval_recall@41"] == 1.0
    assert 0 < found["metrics"]["text_retrieval_recall@41"] < 1
    for name, (low, high) in found["intervals"].items():
        assert low <= found["metrics"][name] <= high, name
    assert [line.split()[0] for line in out.splitlines() if line] == ["41", "k", "1", "2", "41"]
    assert "<svg" in (tmp_path / "p.svg").read_text()
    code, out, _ = run_command(capsys, "eval", "retrieval", *model, "--data", data, "--features", tmp_path / "f")
    assert code == 0
    assert json.loads(out)["metrics"]["text_retrieval_recall@1"] == found["metrics"]["text_retrieval_recall@1"]


WRONG = {
    "plot": (["--plot", "nowhere/p.png"], "no folder nowhere to write p.png in"),
    "json": (["--json", "nowhere/r.json"], "no folder nowhere to write r.json in"),
    "no image": (["--data", "{tmp}/texts.tar"], "not one of the 2 images of the evaluation set can be used; first: "),
    "no caption": (["--data", "{tmp}/images.tar"], "sample has no caption"),
    "empty caption": (["--data", "{tmp}/empty.tar"], "caption is empty"),
    "no data": (["--data", "nowhere.tar"], "no such shard: nowhere.tar"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, model, data, tmp_path, capsys):
    write_shard(tmp_path / "texts.tar", [{"txt": b"a cat"}, {"txt": b"a dog"}])
    write_shard(tmp_path / "images.tar", [{"png": picture(0), "json": b"{}"}])
    write_shard(tmp_path / "empty.tar", [{"png": picture(0), "json": b'{"caption": ["", " "]}'}])
    arguments, message = WRONG[name]
    arguments = [word.format(tmp=tmp_path) for word in arguments]
    given = [] if "--data" in arguments else ["--data", data]
    code, out, err = run_command(capsys, "eval", "retrieval", *model, *given, *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def as_rank(rank, commands):
    """Run commands as one of the processes of torchrun, and return what each prints."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, rank, 3, 3)), strict=True)))
    found = []
    for arguments in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
        found.append((code, out.getvalue(), err.getvalue() if code else ""))
    return found


@pytest.mark.long
def test_three_ranks_give_what_one_gives(model, data, tmp_path, capsys):
    """With 64 images a batch there is one block, so that two ranks have none."""
    common = [*model, "--data", str(data), "--batch-size"]
    commands = [
        ["eval", "retrieval", *common, "8"],
        ["eval", "retrieval", *common, "64"],
        ["eval", "zeroshot", *common, "8", "--templates", "simple"],
    ]
    alone = []
    for arguments in commands:
        code, out, err = run_command(capsys, *arguments)
        assert code == 0, err
        alone.append((0, out, ""))
    assert run_ranks(as_rank, 3, commands, folder=tmp_path) == [alone, *[[(0, "", "")] * 3] * 2]
