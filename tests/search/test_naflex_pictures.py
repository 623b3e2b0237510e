"""A NaFlex model embeds, evaluates and finds pictures in their own aspect.

The tests compare with features of pictures that are encoded one by one. The tower and the image preprocessing are
compared with timm's in tests/models and tests/data.
"""

import dataclasses

import pytest
import torch

import clipfast
from clipfast import Embeddings
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.evaluate.encoder import Encoder
from clipfast.evaluate.features import encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.factory import set_preprocessing, transform_of
from clipfast.models import build
from clipfast.models.images import open_image
from clipfast.models.packed_images import batch_images

from ..small_runs import output_of, picture

MOST = 30
SIZES = [(90, 30), (30, 90), (40, 40), (200, 21), (64, 48), (48, 64), (17, 33), (5, 7), (300, 200), (33, 100)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Make a NaFlex model with random weights, and ten pictures of several aspects in folders of classes."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("tqdm")
    folder = tmp_path_factory.mktemp("naflex")
    config = clipfast.get_model_config("naflex_ViT-B-16").with_vision(layers=2, width=64, head_width=32)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, width=64, heads=2, layers=1))
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    set_preprocessing(model, {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.3), "interpolation": "bicubic",
                              "resize_mode": "shortest"})  # fmt: skip
    export_open_clip(model, folder / "model")
    for number, (width, height) in enumerate(SIZES):
        path = folder / "pictures" / ("flat" if width > height else "high") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, height, width))
    return folder


def one_by_one(home, paths, most):
    """Return the features of pictures that the public transform and model encode one by one."""
    given = f"local-dir:{home}/model"
    model, _, transform = clipfast.create_model_and_transforms(given, force_image_seq_len=most)
    assert transform.max_patches == most
    with torch.no_grad():
        return torch.cat([model.encode_image([transform(open_image(path))], normalize=True) for path in paths])


def assert_near(found, expected, limit=1e-5):
    """Check that features of unit length agree."""
    assert (found.float() - expected).abs().max() <= limit


def test_pictures_are_embedded_and_found(home, capsys, tmp_path):
    options = ["--model", f"local-dir:{home}/model", "--device", "cpu", "--data", home / "pictures"]
    options += ["--image-seq-len", MOST, "--batch-size", 4, "--precision", "fp32"]
    contents = []
    for workers in "02":
        output = tmp_path / workers
        output_of(capsys, "embed", *options, "--workers", workers, "--output", output)
        contents.append(Embeddings.open(output))
    assert torch.equal(contents[0].features, contents[1].features)
    paths = contents[0].metadata["image_path"].to_pylist()
    expected = one_by_one(home, paths, MOST)
    assert_near(contents[0].features, expected)
    searched = ["search", output, "--image", paths[3], "--device", "cpu", "--table"]
    out, _ = output_of(capsys, *searched)
    score, place = (expected @ expected[3]).topk(2)
    assert [f"{score[1]:.4f}", paths[place[1]]] in [line.split() for line in out.splitlines()]


def test_sets_are_encoded(home):
    images = LabelledSet(str(home / "pictures"))
    paths = sorted((home / "pictures").rglob("*.png"))
    encoder = Encoder.load(f"local-dir:{home}/model", device="cpu", image_seq_len=MOST)
    for workers in (0, 2):
        (found,) = encode_set([encoder], images, batch_size=4, workers=workers)
        assert_near(found.features, one_by_one(home, paths, MOST))
    other = Encoder.load(f"local-dir:{home}/model", device="cpu")
    assert other.digest != encoder.digest
    (found,) = encode_set([other], images)
    assert_near(found.features, one_by_one(home, paths, 1024))


def test_images_by_a_list(home):
    model = clipfast.create_model(f"local-dir:{home}/model", force_image_seq_len=MOST)
    paths, to_bytes = sorted((home / "pictures").rglob("*.png")), transform_of(model, uint8=True)
    images = [to_bytes(open_image(path)) for path in paths]
    with torch.no_grad():
        for given in (images, batch_images(images, to_bytes)):
            assert_near(model.encode_image(given, normalize=True), one_by_one(home, paths, MOST))


def test_other_models_have_no_sequence_and_none_is_empty():
    with pytest.raises(ValueError, match=r"force_image_seq_len .* is for NaFlex models, and ViT-T-8-32"):
        clipfast.create_model("ViT-T-8-32", force_image_seq_len=9)
    with pytest.raises(ValueError, match=r"image_seq_len .* of at least 1"):
        clipfast.create_model("naflex_ViT-B-16", force_image_seq_len=0, device="meta")
