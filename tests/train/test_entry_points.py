"""Entry points and methods that OpenCLIP has give its results on the same weights."""

import itertools
import json

import pytest
import torch

import clipfast
from clipfast import convert_checkpoint, create_model, create_model_from_pretrained, export_open_clip
from clipfast.checkpoints.preprocessing import preprocessing_of
from clipfast.kernels.reference import CLIP_MEAN
from clipfast.train.optim import parse_arguments

from ..checkpoints.conftest import CONFIGS, inputs, make_model, same_bits, save_own
from ..small_runs import cases

PRECISIONS = ["fp32", "fp16", "bf16", "pure_fp16", "pure_bf16", "amp"]


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path) -> str:
    """Return a folder of a model that OpenCLIP and clipfast load."""
    pytest.importorskip("open_clip")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    export_open_clip(make_model(CONFIGS[request.param]), tmp_path / "model")
    torch.manual_seed(1)
    return f"local-dir:{tmp_path}/model"


def both(folder, **options):
    """Return OpenCLIP's model and clipfast's with the same weights, in evaluation mode."""
    open_clip = pytest.importorskip("open_clip")
    return open_clip.create_model(folder, **options).eval(), create_model(folder, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision, folder):
    theirs, ours = both(folder, precision=precision)
    assert same_bits(ours.state_dict(), theirs.state_dict())
    images, texts = inputs(ours.config)
    images = images.to(ours.visual.conv1.weight.dtype)
    truth = create_model(folder).eval().double()(images.double(), texts)
    for true, own, other in zip(truth[:2], ours(images, texts), theirs(images, texts), strict=False):
        assert own.dtype == other.dtype
        errors = [(value.double() - true).square().mean().sqrt().item() for value in (own, other)]
        # CONTRIBUTING.md's rule: the RMS error is at most twice PyTorch's own error at this dtype
        assert errors[0] <= 2 * errors[1] + 1e-6
    assert ours.encode_image(images.mul(9).to(torch.uint8)).dtype == ours(images, texts)[0].dtype


@torch.no_grad()
def test_logits_and_methods(folder):
    theirs, ours = both(folder)
    pair = inputs(ours.config)
    same(ours.get_logits(*pair), theirs.get_logits(*pair))
    assert ours.no_weight_decay() == theirs.no_weight_decay()


def same(own, other, path=""):
    """Assert that nested outputs of OpenCLIP's model and clipfast's have the same names, shapes and values."""
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
    images, texts = inputs(ours.config)
    is_vit = isinstance(ours.config.vision.layers, int)

    def compare(*arguments, **options):
        """Compare the intermediate features of clipfast's model with OpenCLIP's, and return OpenCLIP's."""
        expected = theirs.forward_intermediates(*arguments, **options)
        same(ours.forward_intermediates(*arguments, **options), expected, f"{options}")
        return expected

    for changed in (0, 1, 2, len(FLAGS)):  # try none, one, two, and all of the flags
        for names in itertools.combinations(FLAGS, changed):
            fmt = "NLC" if is_vit and changed % 2 else "NCHW"
            compare(images, texts, image_output_fmt=fmt, **dict.fromkeys(names, True))
    for indices, stop_early in itertools.product((1, [0], (1, 0), [-2]), (False, True)):
        options = {"image_indices": indices, "text_indices": indices, "stop_early": stop_early}
        if is_vit:
            compare(images, texts, **options)
        else:  # OpenCLIP's ResNet may stop too early, and pools the last index's features: compare only intermediates
            if not stop_early:
                expected = compare(images, texts, **options, intermediates_only=True)
            early = options | {"stop_early": True, "intermediates_only": True}
            same(ours.forward_intermediates(images, texts, **early), expected)
            full = ours.forward_intermediates(images, texts, image_indices=indices, stop_early=stop_early)
            torch.testing.assert_close(full["image_features"], ours.encode_image(images, normalize=True))
    for only in ({"image": images}, {"text": texts}, {}):
        compare(**only)
    same(ours.visual.forward_intermediates(images), theirs.visual.forward_intermediates(images))


def test_intermediates_with_gradients_and_checkpointing(folder):
    ours = create_model(folder).eval()
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
        ({"image_indices": 3}, "2 stages, so the last 3"),
        ({"text_indices": [0, 2]}, r"indices must be from -2 to 1, got \[0, 2\]"),
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


@pytest.mark.parametrize("unlocked", [0, 1, 2, 5])
def test_locking(unlocked, folder):
    theirs, ours = both(folder)
    is_vit = isinstance(ours.config.vision.layers, int)
    frozen = []
    for model in (theirs, ours):
        if is_vit or unlocked == 0:  # OpenCLIP 3.3.0 can lock a ResNet only as a whole
            model.lock_image_tower(unlocked_groups=unlocked)
        model.lock_text_tower(unlocked_layers=unlocked)
        frozen.append({name for name, parameter in model.named_parameters() if not parameter.requires_grad})
    assert frozen[0] == frozen[1]
    assert "logit_scale" not in frozen[0]


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
    model.visual.layer4.eval()
    torch.testing.assert_close(model.encode_image(images), before)
    _check_checkpoints_of_constant_statistics(model, tmp_path)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        model.lock_text_tower(-1)
    with pytest.raises(ValueError, match="freeze_layer_norm must be True"):
        model.lock_text_tower(freeze_layer_norm=False)


def _check_checkpoints_of_constant_statistics(model, tmp_path):
    """Check that a checkpoint of a model with frozen BatchNorm statistics can be loaded.

    Both packages load it into a new model, and clipfast also into a model that has the same locks.
    """
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


@pytest.mark.parametrize("folder", ["ViT", "QuickGELU"], indirect=True)
def test_sizes_are_forced_as_there(folder):
    size, length = 64, 12
    theirs, ours = both(folder, force_image_size=(size, size), force_context_length=length)
    assert (ours.visual.image_size, ours.context_length) == (size, length)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@cases(r"""
precision=fp8: unknown precision 'fp8'; known: fp32, amp, .*pure_fp16, bf16, fp16
pretrained_image=True: pretrained_image=True .*only False
pretrained_hf=x: pretrained_hf='x' .*only False or True
weights_only=False: weights_only=False .*only True
jit=True: jit=True is not supported
force_naflex_vision=True: force_naflex_vision=True .*NaFlex
audio_aug_cfg={}: audio_aug_cfg={} .*only None
require_pretrained=True: ViT-T-8-32 has no weights of its own
force_preprocess_cfg={"size":3}: unknown settings \['size'\]
force_preprocess_cfg={"mean":(1,2)}: mean of images must be three numbers, got \(1, 2\)
force_preprocess_cfg={"interpolation":"area"}: interpolation 'area'
foce_quick_gelu=True: create_model: unknown argument 'foce_quick_gelu'
""")
def test_wrong_arguments(options, said):
    with pytest.raises(TypeError if "foce_quick_gelu" in options else ValueError, match=said):
        create_model("ViT-T-8-32", **options)


def test_arguments_that_change_nothing(tmp_path):
    words = "pretrained_image=False pretrained_hf=False weights_only=True load_weights_only=True jit=False "
    words += "pretrained_text_path=None force_custom_text=False force_naflex_vision=False pretrained_audio_path=None "
    options = parse_arguments(f"{words} audio_aug_cfg=None".split())
    torch.save(create_model("ViT-T-8-32").state_dict(), tmp_path / "w.pt")
    model = create_model_from_pretrained("ViT-T-8-32", tmp_path / "w.pt", return_transform=False, **options)
    # OpenCLIP's default for both arguments is True.
    create_model("ViT-T-8-32", pretrained_text=True, pretrained_hf=True)
    assert isinstance(model, clipfast.CLIP)
    assert not model.training


def test_weights_bring_the_preparation_of_their_images(tmp_path):
    """The checkpoint of the weights determines the image preprocessing, no matter how the model is named."""
    pytest.importorskip("safetensors")
    model = create_model("ViT-T-8-32", force_preprocess_cfg={"mean": 0.5, "resize_mode": "squash"})
    prepared = model.visual.preprocess_cfg
    own = {
        "model_config": model.config.to_dict(),
        "preprocess_cfg": preprocessing_of(model),
    }
    torch.save({"state_dict": model.state_dict(), "clipfast": own}, tmp_path / "own.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    export_open_clip(model, tmp_path / "same")
    export_open_clip(create_model("ViT-T-8-32"), tmp_path / "other")
    for file in ("own.pt", "same/open_clip_model.safetensors"):
        for name in ("ViT-T-8-32", f"local-dir:{tmp_path}/other"):
            assert create_model(name, tmp_path / file).visual.preprocess_cfg == prepared, (file, name)
    # a file without preprocessing keeps the preprocessing of the name
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
    # No download is tried for a path.
    with pytest.raises(ValueError, match="no checkpoint at none: there is no such file"):
        create_model("hf-hub:org/none", "none")
