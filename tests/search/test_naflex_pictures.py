"""A NaFlex model embeds, evaluates, classifies and finds pictures in their own aspect, with timm's features."""

import dataclasses
import random

import pytest
import torch
from PIL import Image, ImageDraw

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

from ..small_runs import run_command

timm = pytest.importorskip("timm")
pytest.importorskip("timm.models.naflexvit", reason="this timm has no NaFlexViT")

MOST = 30
SIZES = [(90, 30), (30, 90), (40, 40), (200, 21), (64, 48), (48, 64), (17, 33), (5, 7), (300, 200), (33, 100)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A NaFlex model with random weights, and ten drawings of several aspects, which lie in the folders of classes."""
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
    draw = random.Random(0)
    for number, size in enumerate(SIZES):
        picture = Image.new("RGB", size, "white")
        for _ in range(9):
            corners = [draw.uniform(0, side) for side in size * 2]
            box = [*map(min, corners[:2], corners[2:]), *map(max, corners[:2], corners[2:])]
            ImageDraw.Draw(picture).ellipse(box, fill=tuple(draw.randrange(256) for _ in range(3)))
        path = folder / "pictures" / ("flat" if size[0] > size[1] else "high") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def of_timm(home, paths, most):
    """Return the features of pictures as OpenCLIP computes them: timm's transform, padding, and timm's tower."""
    from timm.data import create_transform
    from timm.data.naflex_dataset import NaFlexCollator

    model = clipfast.create_model(f"local-dir:{home}/model")
    kwargs = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    tower = timm.create_model("naflexvit_base_patch16_gap", num_classes=0, **kwargs).eval()
    tower.load_state_dict(model.visual.trunk.state_dict())
    transform = create_transform(
        (3, 224, 224), is_training=False, naflex=True, patchify=True, patch_size=16, max_seq_len=most,
        mean=model.visual.image_mean, std=model.visual.image_std, interpolation="bicubic",
    )  # fmt: skip
    batch, _ = NaFlexCollator(most)([(transform(open_image(path)), 0) for path in paths])
    with torch.no_grad():
        features = model.visual.head.proj(tower({key: batch[key] for key in ("patches", "patch_coord", "patch_valid")}))
    return torch.nn.functional.normalize(features, dim=-1)


def assert_near(found, expected, limit=1e-5):
    """Check that features of unit length agree."""
    assert (found.float() - expected).abs().max() <= limit


def test_pictures_are_embedded_and_found(home, capsys, tmp_path):
    common = ["--model", f"local-dir:{home}/model", "--device", "cpu"]
    options = ["--data", str(home / "pictures"), "--image-seq-len", str(MOST), "--batch-size", "4"]
    contents = []
    for workers in "02":
        output = tmp_path / workers
        arguments = [*common, *options, "--workers", workers, "--output", str(output), "--precision", "fp32"]
        assert run_command(capsys, "embed", *arguments)[0] == 0
        contents.append(Embeddings.open(output))
    assert torch.equal(contents[0].features, contents[1].features)
    paths = contents[0].metadata["image_path"].to_pylist()
    expected = of_timm(home, paths, MOST)
    assert_near(contents[0].features, expected)
    searched = ["search", str(tmp_path / "0"), "--image", paths[3], "--device", "cpu", "--table"]
    code, out, err = run_command(capsys, *searched)
    assert code == 0, err
    score, place = (expected @ expected[3]).topk(2)
    assert [f"{score[1]:.4f}", paths[place[1]]] in [line.split() for line in out.splitlines()]
    labels = ["--labels", "cat", "dog", "--json", str(tmp_path / "labels.json")]
    assert run_command(capsys, "classify", paths[0], *common, *labels)[0] == 0


def test_sets_are_encoded(home, capsys, tmp_path):
    images = LabelledSet(str(home / "pictures"))
    paths = sorted((home / "pictures").rglob("*.png"))
    encoder = Encoder.load(f"local-dir:{home}/model", device="cpu", image_seq_len=MOST)
    for workers in (0, 2):
        (found,) = encode_set([encoder], images, batch_size=4, workers=workers)
        assert_near(found.features, of_timm(home, paths, MOST))
    other = Encoder.load(f"local-dir:{home}/model", device="cpu")
    assert other.digest != encoder.digest
    (found,) = encode_set([other], images)
    assert_near(found.features, of_timm(home, paths, 1024))
    arguments = ["--model", f"local-dir:{home}/model", "--data", str(home / "pictures"), "--device", "cpu"]
    code, _, err = run_command(capsys, "eval", "zeroshot", *arguments, "--image-seq-len", str(MOST))
    assert code == 0, err


def test_images_by_a_list(home):
    model, _, transform = clipfast.create_model_and_transforms(f"local-dir:{home}/model", force_image_seq_len=MOST)
    assert transform.max_patches == MOST
    pictures = [open_image(path) for path in sorted((home / "pictures").rglob("*.png"))]
    with torch.no_grad():
        floats = model.encode_image([transform(picture) for picture in pictures], normalize=True)
        assert_near(floats, of_timm(home, sorted((home / "pictures").rglob("*.png")), MOST))
        to_bytes = transform_of(model, uint8=True)
        assert_near(model.encode_image(batch_images(list(map(to_bytes, pictures)), to_bytes), normalize=True), floats)


def test_other_models_have_no_sequence_and_none_is_empty():
    with pytest.raises(ValueError, match=r"force_image_seq_len .* is for NaFlex models, and ViT-T-8-32"):
        clipfast.create_model("ViT-T-8-32", force_image_seq_len=9)
    with pytest.raises(ValueError, match=r"image_seq_len .* of at least 1"):
        clipfast.create_model("naflex_ViT-B-16", force_image_seq_len=0, device="meta")
