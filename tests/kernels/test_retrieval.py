"""Test the ranks for recall@k beyond their cases: exact ties, no good rank for NaN, float64, autocast, errors."""

import re

import pytest
import torch
import torch.nn.functional as F

from clipfast.bench.inspection import offline
from clipfast.kernels import dtypes, reference, retrieval_ranks
from clipfast.kernels.launch import record_launches
from clipfast.kernels.retrieval.spec import RankShape
from clipfast.kernels.spec import Draw, specs

from ..conftest import DTYPES, LEG
from .conftest import call_at

pytestmark = pytest.mark.usefixtures("poison")

FINEST = [torch.float64] if LEG == "cpu" else []


def same(ours, expected):
    """Return whether two results of the retrieval ranks are equal."""
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_pairs_by_default(device):
    op, expected, inputs, _ = call_at("retrieval_ranks", RankShape(67, 67, 24), device)
    inputs["text_image"] = torch.arange(67, device=device)
    assert same(op(inputs["image"], inputs["text"]), expected(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_of_any_value(dtype, device):
    # Rounding may decide the order of nearly equal scores, so a rank may be that of a slightly higher or lower score.
    image, text = (F.normalize(torch.randn(n, 96), dim=-1).to(device, dtype) for n in (90, 211))
    owner = torch.randint(90, (211,), device=device)
    scores = image.double() @ text.double().T
    own = owner == torch.arange(90, device=device)[:, None]
    best = scores.masked_fill(~own, float("-inf"))
    ranks = retrieval_ranks(image, text, text_image=owner)
    for dim, ours in ((1, ranks[0]), (0, ranks[1])):
        limit = best.amax(dim, keepdim=True)
        least, most = (((scores >= limit + slack) & ~own).sum(dim) for slack in (1e-6, -1e-6))
        asked = own.any(dim)
        assert torch.equal(ours == -1, ~asked)
        assert ((least <= ours) & (ours <= most))[asked].all()


@pytest.mark.parametrize("dtype", [*DTYPES, *FINEST], ids=str)
@pytest.mark.parametrize("width", [1, 72, 511])
@pytest.mark.parametrize("size", [(2, 5), (37, 3), (71, 213)], ids=str)
def test_collapsed_features_get_no_credit(size, width, dtype, device):
    # All scores are mathematically equal. If one differed in its last bit, it would get a better rank. A plain product
    # of these sizes would have such differences, because BLAS sums an incomplete block in another order.
    image, text = (torch.randn(1, width).to(device, dtype).expand(n, width) for n in size)
    m, n = size
    owner = torch.arange(n, device=device) % m
    image_ranks, text_ranks = retrieval_ranks(image, text, text_image=owner)
    assert image_ranks.tolist() == [n - k if (k := len(range(i, n, m))) else -1 for i in range(m)]
    assert text_ranks.tolist() == [m - 1] * n


@pytest.mark.parametrize("dtype", [*DTYPES, *FINEST], ids=str)
@pytest.mark.parametrize("width", [5, 513])
def test_duplicates_tie_wherever_they_are(width, dtype, device):
    # A few distinct rows occur many times. Their products differ enough for float64 to give the order. Equal rows must
    # tie to the last bit, including the own pair.
    m, n = (1001, 779) if LEG == "cpu" else (131, 203)
    kinds_x, kinds_y = torch.randn(4, width).to(dtype), torch.randn(6, width).to(dtype)
    pick_x, pick_y = torch.randint(4, (m,)), torch.randint(6, (n,))
    owner = torch.randint(m, (n,))
    table = (kinds_x.double() @ kinds_y.double().T).flatten()
    level = table.argsort().argsort().view(4, 6).double()  # the order of the 24 scores
    expected = reference.retrieval_ranks(
        F.one_hot(pick_x, 4).double() @ level, F.one_hot(pick_y, 6).double(), text_image=owner
    )
    ours = retrieval_ranks(kinds_x[pick_x].to(device), kinds_y[pick_y].to(device), text_image=owner.to(device))
    assert same([x.cpu() for x in ours], expected)


def test_nan_never_helps(device):
    nan = float("nan")
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [nan, 0.0], [0.6, 0.8]], device=device)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [nan, 1.0], [0.0, nan], [0.6, 0.8]], device=device)
    owner = torch.tensor([0, 1, 2, 3, 1, 3], device=device)
    image_ranks, text_ranks = retrieval_ranks(image, text, text_image=owner)
    # For each image, both NaN texts are ahead unless they are its own. Image 2 is NaN, so all five texts of others are
    # ahead. Images 1 and 3 have a NaN text, which is ignored.
    assert image_ranks.tolist() == [2, 1, 5, 1]
    # For each text, image 2 is ahead unless it is its own. Texts 2, 3 and 4 have a NaN score with their own image, so
    # all other images are ahead.
    assert text_ranks.tolist() == [1, 1, 3, 3, 3, 1]
    everything = torch.full_like(image, nan)
    assert [x.tolist() for x in retrieval_ranks(everything, everything)] == [[3] * 4] * 2
    inputs = {"image": image, "text": text, "text_image": owner}
    assert same(retrieval_ranks(**inputs), reference.retrieval_ranks(**inputs))


def test_float64_sees_what_float32_cannot():
    image, text = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    assert retrieval_ranks(image, text)[1].tolist() == [1, 0]
    assert retrieval_ranks(image.float(), text.float())[1].tolist() == [1, 1]


def test_autocast_changes_nothing(device):
    # In bfloat16 these two scores would tie.
    image = torch.tensor([[1.0], [1.001]], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert retrieval_ranks(image, torch.ones(2, 1, device=device))[1].tolist() == [1, 0]


@pytest.mark.parametrize("arch", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shipped.shape, dtype) for shipped in specs()["retrieval_ranks"].shipped for dtype in shipped.dtypes],
    ids=str,
)
def test_both_kernels_multiply_alike(shape, dtype, arch):
    # The scores of own pairs tie with equal scores of others only if both kernels add by the same instructions.
    spec = specs()["retrieval_ranks"]
    with record_launches(arch) as launches:
        spec.op(**spec.call(shape, "", Draw(empty=True), dtypes.DTYPES[dtype]).inputs)
    instructions = []
    for launch in launches:
        ptx = offline.compile_kernel(launch, arch).asm["ptx"]
        instructions.append(set(re.findall(r"\b(?:wgmma\.mma|mma\.sync|tcgen05\.mma|fma\.|mul\.\S*f32)\S*", ptx)))
    own, all_others = instructions
    assert own == all_others != set()


X = torch.zeros(4, 8)
OWNERS = torch.tensor([0, 3, 3, -1])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": X[0]}, "text .*2 dimensions"),
        ({"text": X.half()}, "text is float16"),
        ({"text": X[:, :7]}, "same width"),
        ({"text": X[:3]}, "got 3 and 4"),
        ({"text_image": OWNERS.int()}, "text_image .*got int32"),
        ({"text_image": OWNERS[:3]}, r"text_image must be \[4\]"),
        ({"text_image": OWNERS + 1}, "the 4 images.* 4 at 1"),
        ({"text_image": OWNERS - 1}, "the 4 images.* -2 at 3"),
        ({"text_image": OWNERS + 2**32}, f"the 4 images.* {2**32} at 0"),
    ],
)
def test_errors(changed, message, backend):
    with pytest.raises((TypeError, ValueError), match=f"^retrieval_ranks: .*{message}"):
        retrieval_ranks(**{"image": X, "text": X} | changed, backend=backend)
