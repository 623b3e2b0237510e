"""Patch embedding: values and gradients from bytes and from floats, layouts, the folded normalisation."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast.kernels import patch_embed, reference
from clipfast.kernels.patch_embed import launches

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import compare, value_and_grads
from .cases import PATCH_SHAPES, patch_inputs, strided

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize("shape", PATCH_SHAPES, ids=str)
def test_value_and_gradients(shape, uint8, dtype, device):
    inputs, grad = patch_inputs(shape, dtype, device, uint8=uint8)
    compare(patch_embed, reference.patch_embed, inputs, grad)


def test_other_normalisation(device):
    options = {"mean": (0.1, 0.9, 0.5), "std": (0.5, 0.02, 1.5)}
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=True)
    compare(
        functools.partial(patch_embed, **options), functools.partial(reference.patch_embed, **options), inputs, grad
    )


def test_reference_copies_nothing_from_the_host():
    # A CUDA graph cannot hold such a copy; on "meta", every tensor that is not there comes from the host.
    class OnlyMeta(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not isinstance(out, torch.Tensor) or out.device.type == "meta", func
            return out

    images = torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="meta")
    with OnlyMeta():
        out = reference.normalize_uint8(images, reference.CLIP_MEAN, reference.CLIP_STD, torch.float32)
    assert out.shape == images.shape


def test_small_weights_in_half_precision(device):
    # Folding 1 / (255 std) into these weights would leave them below what float16 holds.
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float16, device, uint8=True)
    inputs["weight"] *= 1e-3
    inputs["positional_embedding"] *= 0
    inputs["class_embedding"] *= 0
    compare(patch_embed, reference.patch_embed, inputs, grad)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_plain_images(value, device):
    # The ends of the range, and the byte that becomes 0 inside.
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=True)
    inputs["images"].fill_(value)
    compare(patch_embed, reference.patch_embed, inputs, grad)


@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize("layout", ["hwc", "transposed", "sliced", "offset"])
def test_layouts(layout, uint8, device):
    inputs, grad = patch_inputs((2, 28, 42, 14, 40), torch.float32, device, uint8=uint8)
    expected = value_and_grads(patch_embed, inputs, grad)
    images = inputs["images"]
    moved = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if layout == "hwc" else strided(images, layout)
    moved_inputs = {name: strided(x, layout) for name, x in inputs.items()} | {"images": moved}
    actual = value_and_grads(patch_embed, moved_inputs, strided(grad, layout))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_expanded_gradient(device):
    inputs, _ = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=False)
    compare(patch_embed, reference.patch_embed, inputs, torch.ones((), device=device).expand(2, 5, 40))


@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
def test_no_images(uint8, device):
    inputs, grad = patch_inputs((0, 28, 28, 14, 40), torch.float32, device, uint8=uint8)
    result = value_and_grads(patch_embed, inputs, grad)
    assert result["value"].shape == (0, 5, 40)
    assert not result["d_weight"].any()
    assert not result["d_positional_embedding"].any()


@pytest.mark.skipif(LEG == "cpu", reason="the CPU path does not split")
def test_splits_add_up(device, monkeypatch):
    # 6 x 6 patches of 3 images in several splits, the last one short.
    inputs, grad = patch_inputs((3, 48, 48, 8, 24), torch.float32, device, uint8=True)
    expected = value_and_grads(patch_embed, inputs, grad)
    monkeypatch.setattr(launches, "PATCHES_PER_SPLIT", 40)
    for name, value in value_and_grads(patch_embed, inputs, grad).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-4, msg=name)


def test_frozen_parameters_get_no_gradient(device):
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=False)
    inputs["images"].requires_grad_()
    patch_embed(**inputs).backward(grad)
    assert inputs["images"].grad is not None
    assert all(x.grad is None for name, x in inputs.items() if name != "images")


def test_mixed_dtypes_keep_theirs(device):
    # As under autocast: half-precision weight, float32 positions and pixels.
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=False)
    inputs["weight"] = inputs["weight"].half()
    result = value_and_grads(patch_embed, inputs, grad)
    assert result["value"].dtype == result["d_weight"].dtype == torch.float16
    assert result["d_positional_embedding"].dtype == result["d_images"].dtype == torch.float32


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    inputs, grad = patch_inputs((3, 32, 48, 16, 72), torch.float32, device, uint8=False)
    first = value_and_grads(patch_embed, inputs, grad)
    for _ in range(5):
        again = value_and_grads(patch_embed, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
