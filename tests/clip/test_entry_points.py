"""OpenCLIP's entry points and methods do here what they do there, on the same weights."""

import itertools
import json

import pytest
import torch

import clipfast
from clipfast import (
    convert_checkpoint,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    export_open_clip,
)
from clipfast.kernels.reference import CLIP_MEAN
from clipfast.training.config import TrainConfig

from ..convert.conftest import CONFIGS, inputs, make_model, same_bits, save_own

PRECISIONS = ["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16", "amp", "amp_bf16", "amp_bfloat16"]


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path) -> str:
    """A folder that both packages load."""
    pytest.importorskip("open_clip")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    export_open_clip(make_model(CONFIGS[request.param]), tmp_path / "model")
    return f"local-dir:{tmp_path}/model"


def both(folder, **options):
    """OpenCLIP's model and ours, in evaluation mode."""
    open_clip = pytest.importorskip("open_clip")
    return open_clip.create_model(folder, **options).eval(), create_model(folder, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision, folder):
    theirs, ours = both(folder, precision=precision)
    assert {name: value.dtype for name, value in ours.state_dict().items()} == {
        name: value.dtype for name, value in theirs.state_dict().items()
    }
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    torch.manual_seed(1)
    images, texts = inputs(ours.config)
    images = images.to(ours.visual.conv1.weight.dtype)
    exact = create_model(folder).eval().double()
    truth = exact(images.double(), texts)
    for name, true, own, other in zip(
        ("image", "text"), truth, ours(images, texts), theirs(images, texts), strict=False
    ):
        assert own.dtype == other.dtype, name
        errors = [(value.double() - true).square().mean().sqrt().item() for value in (own, other)]
        # the rule of this repository: an RMS error of at most twice that of PyTorch's own at the dtype
        assert errors[0] <= 2 * errors[1] + 1e-6, (name, errors)


def test_precision_in_training(folder):
    """Every parameter gets its gradient in its own dtype, near that of OpenCLIP's model."""
    theirs, ours = both(folder, precision="bf16")
    torch.manual_seed(1)
    images, texts = inputs(ours.config)
    for model in (theirs, ours):
        image, text, scale = model(images.bfloat16(), texts)
        (scale * (image.float() * text.float()).sum(1)).sum().backward()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
        expected = others[name].grad.float()
        if not name.endswith("k_proj.bias"):  # zero, but for rounding
            torch.testing.assert_close(
                parameter.grad.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item() + 1e-3, msg=name
            )


def test_bytes_in_16_bits(folder):
    ours = create_model(folder, precision="bf16").eval()
    size = ours.visual.image_size
    with torch.no_grad():
        features = ours.encode_image(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    assert features.dtype == torch.bfloat16


@torch.no_grad()
def test_logits_and_methods(folder):
    theirs, ours = both(folder)
    torch.manual_seed(1)
    pair = inputs(ours.config)
    for own, other in zip(ours.get_logits(*pair), theirs.get_logits(*pair), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert ours.no_weight_decay() == theirs.no_weight_decay()


def same(own, other, path=""):
    """Assert that two nested outputs have the same names, shapes and values."""
    if isinstance(other, torch.Tensor):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-5, msg=lambda text: f"{path}: {text}")
        return
    assert len(own) == len(other), path
    names = list(other) if isinstance(other, dict) else range(len(other))
    assert names == (list(own) if isinstance(own, dict) else range(len(own))), path
    for name in names:
        same(own[name], other[name], f"{path}/{name}")


FLAGS = ("normalize", "normalize_intermediates", "intermediates_only", "image_output_extra_tokens", "output_logits",
         "output_logit_scale_bias")  # fmt: skip


@torch.no_grad()
def test_intermediates(folder):
    theirs, ours = both(folder)
    torch.manual_seed(1)
    images, texts = inputs(ours.config)
    is_vit = isinstance(ours.config.vision.layers, int)
    for values in itertools.product((False, True), repeat=len(FLAGS)):
        options = dict(zip(FLAGS, values, strict=True))
        for fmt in ("NCHW", "NLC") if is_vit else ("NCHW",):
            same(
                ours.forward_intermediates(images, texts, image_output_fmt=fmt, **options),
                theirs.forward_intermediates(images, texts, image_output_fmt=fmt, **options),
                f"{options} {fmt}",
            )
    for indices, stop_early in itertools.product((1, 2, [0], [-1], (1, 0), [-2]), (False, True)):
        options = {"image_indices": indices, "text_indices": indices, "stop_early": stop_early}
        options["intermediates_only"] = not is_vit  # OpenCLIP's ResNet pools what the last index gives
        if is_vit or not stop_early:  # and stops early where it is not to
            expected = theirs.forward_intermediates(images, texts, **options)
            same(ours.forward_intermediates(images, texts, **options), expected, f"{options}")
        if not is_vit:
            same(ours.forward_intermediates(images, texts, **options | {"stop_early": True}), expected)
            full = ours.forward_intermediates(images, texts, image_indices=indices, stop_early=stop_early)
            torch.testing.assert_close(full["image_features"], ours.encode_image(images, normalize=True))
    for only in ({"image": images}, {"text": texts}, {}):
        same(ours.forward_intermediates(**only), theirs.forward_intermediates(**only))
    same(ours.visual.forward_intermediates(images), theirs.visual.forward_intermediates(images))


def test_intermediates_with_gradients_and_checkpointing(folder):
    _, ours = both(folder)
    torch.manual_seed(1)
    pair = inputs(ours.config)
    grads = []
    for recompute in (False, True):
        ours.set_grad_checkpointing(recompute)
        ours.zero_grad()
        output = ours.forward_intermediates(*pair, output_logits=True)
        (output["image_logits"].sum() + sum(x.square().sum() for x in output["image_intermediates"])).backward()
        grads.append(ours.visual.conv1.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


def test_wrong_requests_of_intermediates():
    model = make_model(CONFIGS["ViT"])
    images, texts = inputs(model.config)
    for options, message in (
        ({"image_indices": 3}, "there are 2 stages, so the last 3 cannot be taken"),
        ({"image_indices": 0}, "there are 2 stages, so the last 0 cannot be taken"),
        ({"text_indices": [0, 2]}, r"indices must be from -2 to 1, got \[0, 2\]"),
        ({"image_indices": []}, r"indices must be from -2 to 1, got \[\]"),
        ({"image_output_fmt": "NHWC"}, "image_output_fmt must be NCHW or NLC, got 'NHWC'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(images, texts, **options)
    with pytest.raises(ValueError, match="output_logits needs both images and texts"):
        model.forward_intermediates(images, output_logits=True)
    model.visual.patch_dropout = 0.5
    with pytest.raises(ValueError, match="patches were dropped, so the others are no grid"):
        model.train().forward_intermediates(images)
    assert model.forward_intermediates(images, image_output_fmt="NLC")["image_intermediates"][0].shape == (3, 8, 64)
    with pytest.raises(ValueError, match="impl must be 'inline', got 'composable'"):
        model.set_grad_checkpointing(True, "composable")


@pytest.mark.parametrize("unlocked", range(6))
def test_locking(unlocked, folder):
    theirs, ours = both(folder)
    is_vit = isinstance(ours.config.vision.layers, int)
    for model in (theirs, ours):
        if is_vit or unlocked == 0:  # OpenCLIP 3.3.0 locks a ResNet as a whole only
            model.lock_image_tower(unlocked_groups=unlocked)
        model.lock_text_tower(unlocked_layers=unlocked)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in theirs.named_parameters() if not parameter.requires_grad}
    assert "logit_scale" not in frozen


def test_locked_statistics(tmp_path):
    model = make_model(CONFIGS["ResNet"])
    images, _ = inputs(model.config)
    with torch.no_grad():
        before = model.encode_image(images)
    model.lock_image_tower(unlocked_groups=2, freeze_bn_stats=True)
    model.train()
    trainable = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad
                 and name.startswith("visual")}  # fmt: skip
    assert trainable == {"layer4", "attnpool"}
    kinds = {
        name: type(module).__name__
        for name, module in model.visual.named_modules()
        if "BatchNorm" in repr(type(module))
    }
    assert all((kind == "BatchNorm2d") == name.startswith("layer4") for name, kind in kinds.items())
    assert {name for name in kinds if "." not in name} == {"bn1", "bn2", "bn3"}
    model.visual.layer4.eval()
    torch.testing.assert_close(model.encode_image(images), before)
    _check_checkpoints_of_constant_statistics(model, tmp_path)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        model.lock_text_tower(-1)
    with pytest.raises(ValueError, match="freeze_layer_norm must be True"):
        model.lock_text_tower(freeze_layer_norm=False)


def _check_checkpoints_of_constant_statistics(model, tmp_path):
    """Both packages load them into a new model, and clipfast into one that is locked in the same way."""
    open_clip = pytest.importorskip("open_clip")
    images, texts = inputs(model.config)
    save_own(model, tmp_path / "own.pt")
    export_open_clip(model, tmp_path / "folder")
    convert_checkpoint(tmp_path / "own.pt", tmp_path / "converted", "open_clip")
    expected = model.eval()(images, texts)[:2]
    folders = [f"local-dir:{tmp_path}/{name}" for name in ("folder", "converted")]
    loaded = [create_model(name) for name in (str(tmp_path / "own.pt"), *folders)]
    loaded += [open_clip.create_model(name) for name in folders]
    for other in loaded:
        torch.testing.assert_close(other.eval()(images, texts)[:2], expected, rtol=1e-5, atol=1e-5)
    locked = clipfast.CLIP(model.config)
    locked.lock_image_tower(unlocked_groups=2, freeze_bn_stats=True)
    clipfast.load_checkpoint(locked, tmp_path / "own.pt")
    assert same_bits(locked.state_dict(), model.state_dict())


def test_no_statistics_are_locked_where_nothing_is():
    model = make_model(CONFIGS["ResNet"])
    for unlocked in (6, 8, 100):
        model.lock_image_tower(unlocked, freeze_bn_stats=True)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert "FrozenBatchNorm2d" not in repr(model)


@pytest.mark.parametrize("folder", ["ViT", "QuickGELU"], indirect=True)
def test_sizes_are_forced_as_there(folder):
    size, length = 64, 12
    theirs, ours = both(folder, force_image_size=(size, size), force_context_length=length)
    assert (ours.visual.image_size, ours.context_length) == (size, length)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"precision": "fp8"}, ValueError, "unknown precision 'fp8'; known: fp32, amp, .*pure_fp16, bf16, fp16"),
        ({"pretrained_image": True}, ValueError, "pretrained_image=True is not supported, only False: clipfast"),
        ({"pretrained_hf": "x"}, ValueError, "pretrained_hf='x' is not supported, only False or True"),
        ({"weights_only": False}, ValueError, "weights_only=False is not supported, only True: clipfast ne"),
        ({"jit": True}, ValueError, "jit=True is not supported"),
        ({"force_naflex_vision": True}, ValueError, "force_naflex_vision=True is not supported, only False: .*NaFlex"),
        ({"audio_aug_cfg": {}}, ValueError, "audio_aug_cfg={} is not supported, only None: clipfast builds no m"),
        ({"foce_quick_gelu": True}, TypeError, "create_model: unknown argument 'foce_quick_gelu'"),
        ({"require_pretrained": True}, ValueError, "ViT-T-8-32 has no weights of its own"),
        ({"force_preprocess_cfg": {"size": 3}}, ValueError, r"force_preprocess_cfg has unknown settings \['size'\]"),
        ({"force_preprocess_cfg": {"mean": (1, 2)}}, ValueError, r"mean of images must be three numbers, got \(1, 2\)"),
        ({"force_preprocess_cfg": {"interpolation": "area"}}, ValueError, "with interpolation 'area', clipfast only "),
    ],
)  # fmt: skip
def test_wrong_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        create_model("ViT-T-8-32", **options)


def test_arguments_that_change_nothing(tmp_path):
    options = {"pretrained_image": False, "pretrained_hf": False, "weights_only": True, "load_weights_only": True,
               "jit": False, "pretrained_text_path": None, "force_custom_text": False,
               "force_naflex_vision": False, "pretrained_audio_path": None, "audio_aug_cfg": None}  # fmt: skip
    torch.save(create_model("ViT-T-8-32").state_dict(), tmp_path / "w.pt")
    model = create_model_from_pretrained("ViT-T-8-32", tmp_path / "w.pt", return_transform=False, **options)
    create_model("ViT-T-8-32", pretrained_text=True, pretrained_hf=True)  # OpenCLIP's defaults
    assert isinstance(model, clipfast.CLIP)
    assert not model.training


def test_preparation_of_images_survives_training_and_export(tmp_path):
    """A run that is resumed, and the folder that it leaves, know how its images are prepared."""
    from clipfast.training.build import build_model

    forced = {"image_mean": 0.5, "image_interpolation": "bilinear", "image_resize_mode": "squash"}
    model = create_model_and_transforms("ViT-T-8-32", **forced)[0]
    saved = {"model_config": model.config.to_dict(), "preprocess_cfg": clipfast.checkpoint.preprocessing_of(model)}
    resumed = build_model(TrainConfig(train_data="data/a.tar"), json.loads(json.dumps(saved)), torch.device("cpu"))
    assert resumed.visual.preprocess_cfg == model.visual.preprocess_cfg
    export_open_clip(model, tmp_path)
    assert create_model(f"local-dir:{tmp_path}").visual.preprocess_cfg == model.visual.preprocess_cfg
    assert resumed.visual.image_mean == (0.5, 0.5, 0.5)


def test_weights_bring_the_preparation_of_their_images(tmp_path):
    """Whatever names the model, its images are prepared as the checkpoint of the weights says."""
    pytest.importorskip("safetensors")
    model = create_model("ViT-T-8-32", force_preprocess_cfg={"mean": 0.5, "resize_mode": "squash"})
    prepared = model.visual.preprocess_cfg
    own = {"model_config": model.config.to_dict(), "preprocess_cfg": clipfast.checkpoint.preprocessing_of(model)}
    torch.save({"state_dict": model.state_dict(), "clipfast": own}, tmp_path / "own.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    export_open_clip(model, tmp_path / "same")
    export_open_clip(create_model("ViT-T-8-32"), tmp_path / "other")
    for file in ("own.pt", "same/open_clip_model.safetensors"):
        for name in ("ViT-T-8-32", f"local-dir:{tmp_path}/other"):
            assert create_model(name, tmp_path / file).visual.preprocess_cfg == prepared, (file, name)
    # a file that says nothing leaves what the name says
    for name, mean in (("ViT-T-8-32", CLIP_MEAN), (f"local-dir:{tmp_path}/same", (0.5, 0.5, 0.5))):
        assert create_model(name, tmp_path / "bare.pt").visual.image_mean == mean


def test_weights_that_are_replaced_need_not_be_there(tmp_path):
    model = create_model("ViT-T-8-32")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model.config.to_dict()}))
    other = create_model(f"local-dir:{tmp_path}", tmp_path / "w.pt")
    assert torch.equal(other.visual.proj, model.visual.proj)
    with pytest.raises(ValueError, match="holds no weights"):
        create_model(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="no checkpoint at none: there is no such file"):  # before anything is read
        create_model("hf-hub:org/none", "none")
