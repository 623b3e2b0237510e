"""Zero-shot classification and retrieval, compared with OpenCLIP and with the full score matrix, and equal images."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from clipfast import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    create_model,
    recall_at,
)
from clipfast.evaluate.classification import classify, metrics
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.evaluate import evaluate
from clipfast.evaluate.features import LabelledFeatures, encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.retrieval import pair_ranks
from clipfast.evaluate.zero_shot import build_zero_shot_classifier, encode_texts
from clipfast.factory import get_tokenizer
from clipfast.models import CLIP
from clipfast.models.images import make_transform
from clipfast.models.packed_text import PackedText

from ..small_runs import picture


@pytest.fixture(scope="module")
def model():
    """Return the small model whose zero-shot accuracy and retrieval are computed."""
    torch.manual_seed(0)
    return create_model("ViT-T-8-32").eval()


def encoded(model, data, **keys):
    """Return the features of a labelled set, encoded in batches of 7."""
    encoder = Encoder("ViT-T-8-32", model, get_tokenizer(), make_transform(32, uint8=True))
    return encode_set([encoder], LabelledSet(str(data), **keys), batch_size=7)[0]


def test_published_prompts():
    assert len(SIMPLE_IMAGENET_TEMPLATES) == 7
    open_clip = pytest.importorskip("open_clip")
    theirs = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert theirs == list(OPENAI_IMAGENET_TEMPLATES)
    assert list(open_clip.IMAGENET_CLASSNAMES) == list(IMAGENET_CLASSNAMES)


def test_padding_stays_unless_the_model_says_that_it_does_not_read_it(model):
    """Texts stay padded for a model without ``reads_padding``, since OpenCLIP's SigLIP models read the padding."""
    tokenizer = get_tokenizer("ViT-T-8-32")
    for says, length in (({}, 77), ({"reads_padding": True}, 77), ({"reads_padding": False}, 4)):
        seen = []
        other = SimpleNamespace(encode_text=lambda ids, normalize, seen=seen: seen.append(ids.shape), **says)
        encode_texts(other, tokenizer, ["a"], "cpu")
        assert seen == [(1, length)], says


def test_many_texts_are_packed_before_they_are_copied_to_a_gpu(monkeypatch):
    model, seen = create_model("ViT-T-8-32", device="meta"), []
    monkeypatch.setattr(CLIP, "encode_text", lambda _, text, normalize: seen.append(type(text)))
    for count in (60, 1):
        encode_texts(model, get_tokenizer("ViT-T-8-32"), ["a", "a cat"] * count, "meta")
    assert seen == [PackedText, torch.Tensor]


CLASSES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in ("cat", "dog", "cow", "bus")]
TEMPLATES = ("a photo of a {}.", "{}", "art of the {}.")


def number_of(value):
    """Convert an array with one element to a float; OpenCLIP calls ``float`` on it, which newer NumPy refuses."""
    return float(getattr(value, "item", lambda: value)())


def test_equal_to_open_clip(monkeypatch):
    """OpenCLIP's zero-shot evaluation of OpenCLIP's model equals clipfast's, of clipfast's model and OpenCLIP's."""
    open_clip = pytest.importorskip("open_clip")
    zero_shot = pytest.importorskip("open_clip_train.zero_shot")
    monkeypatch.setattr(zero_shot, "float", number_of, raising=False)
    encoder = Encoder("ours", create_model("ViT-T-8-32").eval(), get_tokenizer("ViT-T-8-32"), None)
    theirs = Encoder("theirs", open_clip.CLIP(**encoder.model.config.to_dict()).eval(), encoder.tokenizer, None)
    theirs.model.load_state_dict(encoder.model.state_dict())
    images, classes = torch.randint(0, 256, (90, 3, 32, 32), dtype=torch.uint8), torch.randint(len(CLASSES), (90,))
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels, functions = (images.float() / 255 - mean) / std, [template.format for template in TEMPLATES]
    expected = open_clip.build_zero_shot_classifier(
        theirs.model, open_clip.get_tokenizer("ViT-B-32"), CLASSES, functions
    )
    for templates, at_once in ((TEMPLATES, 10), (functions, 4)):
        weights = build_zero_shot_classifier(encoder.model, encoder.tokenizer, CLASSES, templates, at_once)
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    args = SimpleNamespace(device="cpu", precision="fp32", rank=0, batch_size=32)
    batches = list(zip(pixels.split(32), classes.split(32), strict=True))
    run = getattr(zero_shot, "run_zero_shot_classifier", None) or zero_shot.run  # OpenCLIP 3.3 calls this function run
    shares = run(theirs.model, expected, batches, args)
    assert 0 < shares[1] < 1
    labels = [CLASSES[number] for number in classes.tolist()]
    for one, batch in ((encoder, images), (theirs, pixels)):
        found = metrics(classify(one.images(batch), labels, CLASSES, one.classifier(CLASSES, TEMPLATES)))
        assert (found["acc1"], found["acc5"]) == shares


def test_recall():
    assert recall_at(torch.tensor([0, 4, 5, 20])) == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75}
    # a rank of -1 marks a row that is no query, and so no hit
    assert recall_at(torch.tensor([-1, 3, 0, -1]), (1, 5)) == {"R@1": 0.5, "R@5": 1.0}


def test_ranks_of_many_to_many():
    # Captions belong to several images, and images have several captions. By the definition, an item is right if a pair
    # joins it to the query, and not if only a chain of pairs does.
    queries, items = torch.randint(20, (60,)), torch.randint(15, (60,))
    query_features, item_features = (F.normalize(torch.randn(n, 8), dim=-1) for n in (20, 15))
    scores = query_features @ item_features.T
    right = torch.zeros(20, 15, dtype=torch.bool)
    right[queries, items] = True
    best = scores.masked_fill(~right, -1.0).amax(1, keepdim=True)
    wrong = (scores >= best) & ~right & torch.isin(torch.arange(15), items)
    expected = wrong.sum(1)[queries]
    assert torch.equal(pair_ranks(query_features[queries], item_features[items], queries, items), expected)


def test_classes_are_in_order():
    # the order of classes does not depend on the order of images, since a file of class names must match it
    for labels, expected in (("b a b", "a b"), ("10 9 0", "0 9 10"), ("10 9 x", "10 9 x")):
        labels = labels.split()
        assert LabelledFeatures(torch.zeros(3, 1), labels, labels, labels, [0, 1, 2]).classnames == expected.split()


def write_folder(folder, **classes):
    """Write a labelled set: a folder for each class, with a picture for each of the class's seeds."""
    for name, seeds in classes.items():
        (folder / name).mkdir()
        for index, seed in enumerate(seeds):
            (folder / name / f"{index}.png").write_bytes(picture(seed))


def test_image_folder(model, tmp_path):
    write_folder(tmp_path, cat=[0, 1], dog=[0, 2])
    images = encoded(model, tmp_path)
    assert images.labels == ["cat", "cat", "dog", "dog"]
    assert images.classnames == ["cat", "dog"]
    # The first cat and the first dog are equal images, so that both labels are accepted.
    assert images.accepted() == [{"cat", "dog"}, {"cat"}, {"cat", "dog"}, {"dog"}]
    result = evaluate(model, get_tokenizer("ViT-T-8-32"), images, ["a photo of a {}."])
    assert result.right[0] == result.right[2] == [True, True]
    assert sum(result.right[1]) == 1
    assert result.results["zero_shot"]["top5"] == 1.0


def test_the_loss_of_pairs_is_openclips(model, shards):
    """The loss is the mean over pairs of the dense loss of each batch; the last batch is smaller."""
    images, tokenizer = encoded(model, shards.split("::")[0]), get_tokenizer("ViT-T-8-32")
    losses = []
    for start in range(0, 24, 10):
        captions = [texts[0] for texts in images.captions[start : start + 10]]
        with torch.no_grad():
            texts = model.encode_text(tokenizer(captions), normalize=True)
            logits = model.logit_scale.exp() * images.features[start : start + 10] @ texts.T
        right = torch.arange(len(captions))
        losses += len(captions) * [(F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)).item() / 2]
    found = evaluate(model, tokenizer, images, loss_batch=10).results["clip_val_loss"]
    assert found == pytest.approx(sum(losses) / 24, rel=1e-5)
    assert "clip_val_loss" not in evaluate(model, tokenizer, images).results
