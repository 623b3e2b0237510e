"""Patch embedding: values and gradients from bytes and from floats, layouts, normalisation, dropped patches."""

import functools

import pytest
import torch

from clipfast.kernels import floors, patch_embed, reference
from clipfast.kernels.patch_embed import launches

from ..conftest import DTYPES, INTERPRET, LEG, OnlyMeta
from ..numerics import compare, value_and_grads
from .cases import PATCH_SHAPES, counted_bytes, huge_strides, patch_inputs, strided

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
    # a CUDA graph cannot hold such a copy
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
    agree_in_layout(inputs, grad, layout)


def agree_in_layout(inputs, grad, layout):
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


def how_many(share, shape):
    _, height, width, patch, _ = shape
    num_patches = (height // patch) * (width // patch)
    return {"none": 0, "one": 1, "half": num_patches // 2, "all": num_patches}[share]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize("share", ["none", "one", "half", "all"])
@pytest.mark.parametrize("shape", PATCH_SHAPES, ids=str)
def test_kept_patches(shape, share, uint8, dtype, device):
    inputs, grad = patch_inputs(shape, dtype, device, uint8=uint8, keep=how_many(share, shape))
    compare(patch_embed, reference.patch_embed, inputs, grad)


@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize("layout", ["hwc", "transposed", "sliced", "offset"])
def test_layouts_of_kept_patches(layout, uint8, device):
    inputs, grad = patch_inputs((2, 28, 42, 14, 40), torch.float32, device, uint8=uint8, keep=3)
    agree_in_layout(inputs, grad, layout)


def test_indices_of_32_bits(device):
    inputs, grad = patch_inputs((3, 32, 48, 16, 72), torch.float32, device, uint8=False, keep=4)
    expected = value_and_grads(patch_embed, inputs, grad)
    for name, value in value_and_grads(patch_embed, inputs | {"keep": inputs["keep"].int()}, grad).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
def test_all_in_order_is_as_none_dropped(uint8, device):
    inputs, grad = patch_inputs((3, 32, 48, 16, 72), torch.float32, device, uint8=uint8)
    expected = value_and_grads(patch_embed, inputs, grad)
    keep = torch.arange(6, device=device).expand(3, 6)
    for name, value in value_and_grads(functools.partial(patch_embed, keep=keep), inputs, grad).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_dropped_patches_are_not_read(device):
    # What is NaN in a pixel, a position or a gradient would be NaN in everything that it is multiplied by.
    inputs, grad = patch_inputs((2, 21, 35, 7, 40), torch.float32, device, uint8=False, keep=6)
    expected = value_and_grads(patch_embed, inputs, grad)
    dropped = torch.ones(2, 15, dtype=torch.bool, device=device).scatter_(1, inputs["keep"], False)
    pixels = dropped.view(2, 1, 3, 5).repeat_interleave(7, 2).repeat_interleave(7, 3)
    inputs["images"].masked_fill_(pixels, float("nan"))
    inputs["positional_embedding"][1:].masked_fill_(dropped.all(0)[:, None], float("nan"))
    assert dropped.all(0).any()
    result = value_and_grads(patch_embed, inputs, grad)
    for name, value in result.items():
        assert torch.equal(value, expected[name]), name
    assert not result["d_images"].masked_select(pixels).any()
    assert result["d_images"].masked_select(~pixels).all()
    assert not result["d_positional_embedding"][1:][dropped.all(0)].any()


@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
def test_no_images_of_kept_patches(uint8, device):
    inputs, grad = patch_inputs((0, 28, 28, 14, 40), torch.float32, device, uint8=uint8, keep=2)
    result = value_and_grads(patch_embed, inputs, grad)
    assert result["value"].shape == (0, 3, 40)
    assert result["d_positional_embedding"].shape == (5, 40)
    assert not any(result[f"d_{name}"].any() for name in ("weight", "class_embedding", "positional_embedding"))


@pytest.mark.parametrize("batch", [1, 31, 33, 70])
def test_positions_of_many_images(batch, device):
    # one less and one more than a tile of images, and several tiles
    inputs, grad = patch_inputs((batch, 8, 16, 4, 9), torch.float32, device, uint8=False, keep=3)
    compare(patch_embed, reference.patch_embed, inputs, grad)


@pytest.mark.skipif(LEG == "cpu", reason="the CPU path does not split")
def test_splits_of_kept_patches_add_up(device, monkeypatch):
    inputs, grad = patch_inputs((3, 48, 48, 8, 24), torch.float32, device, uint8=True, keep=29)
    monkeypatch.setattr(launches, "PATCHES_PER_SPLIT", 40)
    compare(patch_embed, reference.patch_embed, inputs, grad)


def test_mixed_dtypes_of_kept_patches(device):
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=False, keep=3)
    inputs["weight"] = inputs["weight"].half()
    compare(patch_embed, reference.patch_embed, inputs, grad.half())
    result = value_and_grads(patch_embed, inputs, grad)
    assert result["value"].dtype == result["d_weight"].dtype == torch.float16
    assert result["d_positional_embedding"].dtype == result["d_images"].dtype == torch.float32


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
def test_same_bits_every_time_of_kept_patches(uint8, device, two_threads):
    inputs, grad = patch_inputs((70, 32, 48, 16, 72), torch.float32, device, uint8=uint8, keep=3)
    first = value_and_grads(patch_embed, inputs, grad)
    for _ in range(5):
        again = value_and_grads(patch_embed, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.skipif(LEG == "cpu", reason="refused there")
@pytest.mark.parametrize("wrong", [-1, 15, 2**31 + 1])
def test_an_index_of_no_patch_reads_nothing_and_shows(wrong, device):
    # not through the op, which refuses it on a CPU
    inputs, grad = patch_inputs((2, 21, 35, 7, 40), torch.float32, device, uint8=False, keep=6)
    images, weight, class_embedding, pos, keep = inputs.values()
    bias = torch.zeros(40, device=device)
    right = launches.forward(images, weight, bias, class_embedding, pos, keep)
    others = [0, 1, 2, 4, 5]
    expected = [
        launches.backward_weight(grad[:, [0, *(i + 1 for i in others)]], images, weight, keep[:, others]),
        launches.backward_positions(grad[:, [0, *(i + 1 for i in others)]], keep[:, others], 15),
        launches.backward_images(grad[:, [0, *(i + 1 for i in others)]], images, weight, keep[:, others]),
    ]
    keep[:, 3] = wrong
    tokens = launches.forward(images, weight, bias, class_embedding, pos, keep)
    assert tokens.isnan().any(2).tolist() == [[token == 4 for token in range(7)]] * 2
    assert torch.equal(tokens[:, [0, *(i + 1 for i in others)]], right[:, [0, *(i + 1 for i in others)]])
    actual = [
        launches.backward_weight(grad, images, weight, keep),
        launches.backward_positions(grad, keep, 15),
        launches.backward_images(grad, images, weight, keep),
    ]
    for ours, same in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
def test_offsets_beyond_32_bits():
    images = huge_strides((2, 3, 8, 12))
    values = torch.randn(2, 3, 8, 12).half()
    images.copy_(values)
    inputs, grad = patch_inputs((2, 8, 12, 4, 10), torch.float32, images.device, uint8=False, keep=3)
    op = functools.partial(patch_embed, **{name: x for name, x in inputs.items() if name != "images"})
    for name, value in value_and_grads(op, {"images": images}, grad).items():
        torch.testing.assert_close(value, value_and_grads(op, {"images": values}, grad)[name], msg=name)


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize("keep", [None, 0, 1, 7])
def test_what_is_kept_is_read_or_written_once(keep, uint8, device, monkeypatch):
    # one tile of tokens and one of the embedding, of one image: two read each position that they share
    inputs, grad = patch_inputs((1, 12, 12, 4, 24), torch.float32, device, uint8=uint8, keep=keep)
    floor = functools.partial(floors.patch_embed_floor, 1, 3, 12, 4, 24, 1 if uint8 else 4, 4, keep=keep)
    row, kept = 24 * 4, 9 if keep is None else keep
    leaves = {name: x.requires_grad_(x.is_floating_point() and name != "images") for name, x in inputs.items()}
    moved = counted_bytes(monkeypatch)
    value = patch_embed(**leaves)
    bias = row  # of the normalisation, made from the weight
    assert sum(moved) == floor(backward=False).bytes + bias
    value.backward(grad)
    again = kept * row  # the gradient of the patches' tokens: for the weight, and for the positions
    if keep is None:
        # the positions are PyTorch's: it is not seen to read the gradient and to write theirs
        expected = floor(backward=True).bytes - row - (1 + 9) * row - row
    else:
        indices, tokens = kept * 8, (1 + kept) * 4  # again; and which token each position was added to
        expected = floor(backward=True).bytes + again + indices + tokens + (1 + 9) * 4 - row
    assert sum(moved) == expected + bias


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
def test_autocast_of_kept_patches(device):
    # of floats: with those of bytes, the normalisation is folded into the weight before it is rounded
    inputs, grad = patch_inputs((2, 28, 28, 14, 40), torch.float32, device, uint8=False, keep=2)
    with torch.autocast(device.type, torch.bfloat16):
        actual = value_and_grads(patch_embed, inputs, grad)
    expected = value_and_grads(patch_embed, inputs | {"weight": inputs["weight"].bfloat16()}, grad)
    assert actual["value"].dtype == torch.bfloat16
    assert actual["d_weight"].dtype == torch.float32
    for name, value in actual.items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


@pytest.mark.parametrize("patch", [14, 16, 32])
def test_bytes_are_rounded_less_than_normalised_pixels(patch, device):
    # under autocast, against exact tokens: PyTorch rounds pixels and weights; bytes are exact, and weights rounded once
    inputs, _ = patch_inputs((4, 2 * patch, 3 * patch, patch, 96), torch.float32, device, uint8=True)
    for name in ("class_embedding", "positional_embedding"):
        inputs[name] *= 0
    truth = reference.patch_embed(**{name: x if name == "images" else x.double() for name, x in inputs.items()})
    errors = {}
    for backend in ("auto", "torch"):
        with torch.autocast(device.type, torch.float16 if INTERPRET else torch.bfloat16):
            errors[backend] = (patch_embed(**inputs, backend=backend) - truth).norm()
    # tokens are rounded as well, by both
    assert errors["auto"] < 0.9 * errors["torch"]


def test_gradients_of_float32_weights_are_not_rounded(device):
    inputs, grad = patch_inputs((4, 28, 28, 14, 40), torch.float32, device, uint8=True)
    weight = inputs["weight"].requires_grad_()
    with torch.autocast(device.type, torch.float16 if INTERPRET else torch.bfloat16):
        out = patch_embed(**inputs)
    out.backward(grad.to(out.dtype))
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.to(out.dtype).float())
