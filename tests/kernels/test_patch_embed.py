"""Test the patch embedding beyond its cases: normalisation, splits, dropped patches, wrong indices, dtypes, traffic."""

import re

import pytest
import torch

from clipfast.bench.inspection import offline
from clipfast.kernels import configs, launch, patch_embed, reference
from clipfast.kernels.patch_embed import cpu, launches, matrix
from clipfast.kernels.patch_embed.spec import SPECS, PatchShape
from clipfast.kernels.spec import EXPANDED, Case
from clipfast.verify.rule import in_double

from ..conftest import OnlyMeta
from ..numerics import compare
from .conftest import call_at, leaves_of, needs_sanitizer
from .test_cases import hold

pytestmark = pytest.mark.usefixtures("poison")
(SPEC,) = SPECS
SMALL = PatchShape(2, 28, 28, 14, 40)
SOME_DROPPED = PatchShape(2, 21, 35, 7, 40, uint8=False, keep=6)


def test_other_normalisation(device):
    compare(*call_at("patch_embed", SMALL, device, mean=(0.1, 0.9, 0.5), std=(0.5, 0.02, 1.5)))


def test_reference_copies_nothing_from_the_host():
    # A CUDA graph cannot hold a copy from the host.
    images = torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="meta")
    with OnlyMeta():
        out = reference.normalize_uint8(images, reference.CLIP_MEAN, reference.CLIP_STD, torch.float32)
    assert out.shape == images.shape


@pytest.mark.parametrize("keep", [None, 29], ids=["all", "some"])
def test_splits_add_up(keep, triton_device, monkeypatch):
    # 3 images have 36 or 29 patches each. The patches are divided into several splits, of which the last is shorter.
    monkeypatch.setattr(launches, "PATCHES_PER_SPLIT", 40)
    configs.forget_plans()
    compare(*call_at("patch_embed", PatchShape(3, 48, 48, 8, 24, keep=keep), triton_device))


@pytest.mark.parametrize("layout", ["", "hwc", "transposed", "sliced", "offset", EXPANDED])
def test_patches_that_are_laid_out(layout, interpreted, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", 90)
    monkeypatch.setattr(matrix, "GROUP_BYTES", 1000)  # so that each image is a group of its own
    monkeypatch.setattr(launches, "forward", None)
    bytes_or_floats = [{}, {"uint8": False, "keep": 4}]
    for kind in bytes_or_floats[: 2 if layout in ("", "sliced") else 1]:
        with SPEC.small_tiles(torch.float16):
            hold(SPEC, Case(PatchShape(2, 21, 14, 7, 24, **kind), "rows of 7 pixels", layout=layout), "float16")


def test_tiles_of_an_h100(interpreted, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", 90)
    configs.forget_plans()
    compare(*call_at("patch_embed", PatchShape(2, 28, 28, 14, 40), interpreted, torch.float16))


@needs_sanitizer
class TestSanitized:
    @pytest.mark.parametrize("shape", [(3, 16, 24, 8, 24), (2, 21, 35, 7, 40, True, 3)], ids=str)
    def test_gradient_of_patches_that_are_laid_out(self, shape, sanitizer, monkeypatch):
        # The sanitizer ttsem does not check stores through descriptors, so test_patches_that_are_laid_out interprets
        # the kernel for the tokens instead.
        monkeypatch.setattr(launch, "CPU_ARCH", 90)
        call = call_at("patch_embed", PatchShape(*shape), "cpu", torch.bfloat16)
        images, weight, *_, keep = (*call.inputs.values(), None)[:5]
        gains, shifts = [0.5, 1.0, 2.0], [0.1, 0.2, 0.3]
        (grad,), bias_grad = call.grads, torch.randn(len(weight))
        with SPEC.small_tiles(torch.bfloat16):
            compute = matrix.backward_weight(grad, images, weight, (gains, shifts), keep)
            found = compute(grad, images, weight, keep, bias_grad)
        of_folded = cpu.backward_weight(grad, images, weight, keep).float()
        per_channel = [torch.tensor(numbers)[:, None, None] for numbers in (gains, shifts)]
        expected = of_folded * per_channel[0] + bias_grad[:, None, None, None] * per_channel[1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dropped_patches_are_not_read(device):
    # If a NaN in a dropped pixel or position were read, it would make tokens NaN.
    call = call_at("patch_embed", SOME_DROPPED, device)
    inputs, expected = call.inputs, call.results()
    dropped = torch.ones(2, 15, dtype=torch.bool, device=device).scatter_(1, inputs["keep"], False)
    pixels = dropped.view(2, 1, 3, 5).repeat_interleave(7, 2).repeat_interleave(7, 3)
    inputs["images"].masked_fill_(pixels, float("nan"))
    inputs["positional_embedding"][1:].masked_fill_(dropped.all(0)[:, None], float("nan"))
    assert dropped.all(0).any()
    result = call.results()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert not result["d_images"].masked_select(pixels).any()
    assert result["d_images"].masked_select(~pixels).all()
    assert not result["d_positional_embedding"][1:][dropped.all(0)].any()


@pytest.mark.parametrize("keep", [None, 3], ids=["all", "some"])
def test_mixed_dtypes_keep_theirs(keep, device):
    # The weight has half precision, positions and pixels are float32, as under autocast.
    call = call_at("patch_embed", SMALL.changed(uint8=False, keep=keep), device)
    call.inputs["weight"] = call.inputs["weight"].half()
    compare(*call._replace(grads=(call.grads[0].half(),)))
    result = call.results()
    assert result["value"].dtype == result["d_weight"].dtype == torch.float16
    assert result["d_positional_embedding"].dtype == result["d_images"].dtype == torch.float32


@pytest.mark.parametrize("wrong", [-1, 15, 2**31 + 1])
def test_an_index_of_no_patch_reads_nothing_and_shows(wrong, triton_device):
    # The op refuses an index of no patch on a CPU, so this test calls the launches.
    call = call_at("patch_embed", SOME_DROPPED, triton_device)
    (images, weight, class_embedding, pos, keep), (grad,) = call.inputs.values(), call.grads
    others = [0, 1, 2, 4, 5]
    tokens = [0, *(i + 1 for i in others)]

    def gradients(grad, keep):
        """Return the gradients of the patch embedding for tokens whose patch index is wrong."""
        args = grad, images, weight, keep
        others = [launches.backward_weight(*args)(*args), launches.backward_images(*args)]
        return [*others, launches.backward_positions(grad, keep, 15)(grad, keep)]

    inputs = images, weight, class_embedding, pos, keep
    forward = launches.forward(*inputs, (), (), torch.float32)
    right = forward(*inputs)
    expected = gradients(grad[:, tokens], keep[:, others])
    keep[:, 3] = wrong
    out = forward(*inputs)
    assert out.isnan().any(2).tolist() == [[token == 4 for token in range(7)]] * 2
    assert torch.equal(out[:, tokens], right[:, tokens])
    torch.testing.assert_close(gradients(grad, keep), expected, rtol=1e-5, atol=1e-5)


def test_autocast_of_kept_patches(native):
    # The images are floats. For bytes, the weight is rounded after the normalisation is folded in.
    call = call_at("patch_embed", SMALL.changed(uint8=False, keep=2), native)
    with torch.autocast(native.type, torch.bfloat16):
        actual = call.results()
    expected = call.results(weight=call.inputs["weight"].bfloat16())
    assert actual["value"].dtype == torch.bfloat16
    assert actual["d_weight"].dtype == torch.float32
    for name, value in actual.items():
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


def test_bytes_are_rounded_less_than_normalised_pixels(native):
    # Under autocast, PyTorch rounds normalised pixels and weights to bfloat16. The op of clipfast takes the exact bytes
    # and rounds the weights only.
    op, expected, inputs, (grad,) = call_at("patch_embed", PatchShape(4, 28, 42, 14, 96), native)
    for name in ("class_embedding", "positional_embedding"):
        inputs[name] *= 0
    truth = expected(**in_double(inputs))
    leaves = leaves_of(inputs)
    with torch.autocast(native.type, torch.bfloat16):
        ours, theirs = (op(**leaves, backend=backend) for backend in ("auto", "torch"))
    # Both implementations also round the tokens.
    assert (ours - truth).norm() < 0.9 * (theirs - truth).norm()
    ours.backward(grad.to(ours.dtype))
    gradient = leaves["weight"].grad
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


IMAGES, KEEP = torch.zeros(2, 3, 8, 8), torch.tensor([[2, 0], [3, 1]])
CLASS, POS = torch.zeros(6), torch.zeros(5, 6)
VALID = {"images": IMAGES, "weight": torch.zeros(6, 3, 4, 4), "class_embedding": CLASS, "positional_embedding": POS}
ERRORS = [
    ({"images": IMAGES.long()}, TypeError, "images .*got int64"),
    ({"images": torch.zeros(2, 3, 9, 8)}, ValueError, "9x8 is not a multiple of the patch size 4"),
    ({"images": IMAGES[:, :1], "mean": (1,), "std": (1,)}, ValueError, r"weight must be \[E, 1, P, P\]"),
    ({"weight": torch.zeros(6, 3, 4, 2)}, ValueError, r"weight .*got \(6, 3, 4, 2\)"),
    ({"class_embedding": torch.zeros(7)}, ValueError, r"class_embedding must be \[6\]"),
    ({"positional_embedding": POS[1:]}, ValueError, r"must be \[5, 6\] .*got \(4, 6\)"),
    ({"mean": (0.5,)}, ValueError, "mean must be 3"),
    ({"mean": 0.5}, TypeError, "mean must be a sequence"),
    ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be 3 positive"),
    ({"keep": KEEP.repeat(1, 3)}, ValueError, "at most the 4 patches"),
    ({"keep": KEEP + 1}, IndexError, r"got 4 at \[1, 0\]"),
    ({"keep": KEEP - 1}, IndexError, r"got -1 at \[0, 1\]"),
    ({"keep": KEEP.clamp(max=1)}, ValueError, r"once, got \[1, 1\]"),
]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("changed", "error", "message"), ERRORS, ids=[case[2] for case in ERRORS])
def test_errors(changed, error, message, backend):
    with pytest.raises(error, match=f"^patch_embed: .*{message}"):
        patch_embed(**(VALID | changed), backend=backend)


def test_gradient_of_the_weight_divides_in_64_bits_only_outside_its_loop():
    # A 64-bit division is a function call. With one division for each row of each step, divisions took more time than
    # the product. The remaining divisions find the image of a program's first row, and the program's split.
    call = call_at("patch_embed", PatchShape(4, 28, 28, 14, 64), "cpu", torch.bfloat16)
    launches = offline.named(offline.record(80, call.results))
    ptx = offline.compile_kernel(launches["_patch_embed_bwd_weight_kernel 0"], 80).asm["ptx"]
    assert len(re.findall(r"(?:div|rem)\.[su]64", ptx)) <= 2
