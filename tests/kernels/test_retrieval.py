"""Ranks for recall@k: exact against the full scores, ties to the last bit, NaN never a good rank, and no M x N."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F

from clipfast.bench.inspection import offline
from clipfast.bench.inspection.shipped import shipped_cases
from clipfast.kernels import reference, retrieval_ranks

from ..conftest import DTYPES, INTERPRET, LEG, ON_GPU
from .cases import huge_strides, rank_inputs, strided

module = sys.modules["clipfast.kernels.retrieval"]
pytestmark = pytest.mark.usefixtures("poison")

WIDER = [torch.float64] if LEG == "cpu" else []
# (images, texts, width)
SHAPES = [
    (1, 1, 1),  # a pair: nothing else can be ahead
    (1, 37, 8),  # one image: the rank of a text can only be 0
    (5, 2, 3),  # images without texts
    (64, 64, 64),  # exactly one fp32 tile
    (67, 201, 40),  # prime, three texts per image, a width that no tile divides
    (130, 129, 72),  # past the half-precision tile
]


def same(ours, expected):
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_full_scores(shape, dtype, device):
    # Small integers: every score is exact in any order of summation, and many tie.
    inputs = rank_inputs(shape, dtype, device)
    assert same(retrieval_ranks(**inputs), reference.retrieval_ranks(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_by_default(dtype, device):
    inputs = rank_inputs((67, 67, 24), dtype, device) | {"text_image": None}
    expected = reference.retrieval_ranks(**inputs)
    assert same(retrieval_ranks(**inputs), expected)
    assert same(retrieval_ranks(**inputs | {"text_image": torch.arange(67, device=device)}), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_of_any_value(dtype, device):
    # Where rounding decides, a rank may be that of scores a little higher or lower.
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


def test_by_hand(device):
    # image 0 is nearest to text 0; image 1 has texts 1 and 2, image 2 has none, and text 3 belongs to no image
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], device=device)
    text = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]], device=device)
    ranks = retrieval_ranks(image, text, text_image=torch.tensor([0, 1, 1, -1], device=device))
    assert [x.tolist() for x in ranks] == [[0, 1, -1], [0, 2, 0, -1]]


@pytest.mark.parametrize("dtype", [*DTYPES, *WIDER], ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 72, 511, 512])
@pytest.mark.parametrize("size", [(2, 2), (2, 5), (5, 37), (37, 3), (71, 213)], ids=str)
def test_collapsed_features_get_no_credit(size, width, dtype, device):
    # All scores are equal in mathematics; one that differs in its last bit would give credit. BLAS makes it differ at
    # such sizes, if it is asked for them.
    image, text = (torch.randn(1, width).to(device, dtype).expand(n, width) for n in size)
    m, n = size
    owner = torch.arange(n, device=device) % m
    image_ranks, text_ranks = retrieval_ranks(image, text, text_image=owner)
    assert image_ranks.tolist() == [n - k if (k := len(range(i, n, m))) else -1 for i in range(m)]
    assert text_ranks.tolist() == [m - 1] * n


@pytest.mark.parametrize("dtype", [*DTYPES, *WIDER], ids=str)
@pytest.mark.parametrize("width", [5, 40, 513])
def test_duplicates_tie_wherever_they_are(width, dtype, device):
    # A few distinct rows at many places. Their products differ enough for float64 to tell the order, and equal rows
    # must tie to the last bit, the own pair included.
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
    # every image: both NaN texts are ahead unless they are its own; image 2 is NaN, so all five others are ahead;
    # images 1 and 3 have a NaN text, which is as if it were not there
    assert image_ranks.tolist() == [2, 1, 5, 1]
    # every text: image 2 is ahead unless it is its own; texts 2, 3 and 4 have a NaN score with their own, and come last
    assert text_ranks.tolist() == [1, 1, 3, 3, 3, 1]
    everything = torch.full_like(image, nan)
    assert [x.tolist() for x in retrieval_ranks(everything, everything)] == [[3] * 4] * 2
    inputs = {"image": image, "text": text, "text_image": owner}
    assert same(retrieval_ranks(**inputs), reference.retrieval_ranks(**inputs))


def test_infinite_scores(device):
    inputs = rank_inputs((20, 50, 4), torch.float32, device)
    inputs["image"][3, 1], inputs["text"][7, 2], inputs["text"][9] = float("inf"), float("-inf"), 0.0
    assert same(retrieval_ranks(**inputs), reference.retrieval_ranks(**inputs))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    inputs = rank_inputs((67, 201, 40), torch.float32, device)
    expected = retrieval_ranks(**inputs)
    changed = {name: strided(inputs[name], layout) for name in ("image", "text")}
    owner = inputs["text_image"][:, None].expand(-1, 2)[:, 0]
    assert same(retrieval_ranks(**changed, text_image=owner), expected)


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
@pytest.mark.parametrize("name", ["image", "text"])
def test_offsets_beyond_32_bits(name):
    inputs = rank_inputs((4, 4, 40), torch.float16, torch.device("cpu"))
    expected = retrieval_ranks(**inputs)
    far = huge_strides((4, 40))
    far.copy_(inputs[name])
    assert same(retrieval_ranks(**inputs | {name: far}), expected)


def test_tiles_and_programs_add_up(device, monkeypatch):
    monkeypatch.setattr(module, "SPAN", 128)
    monkeypatch.setattr(module, "TILE", 192)
    inputs = rank_inputs((600, 411, 6), torch.float32, device)
    assert same(retrieval_ranks(**inputs), reference.retrieval_ranks(**inputs))


@pytest.mark.parametrize("shape", [(0, 0, 8), (0, 5, 8), (5, 0, 8), (3, 4, 0)], ids=str)
def test_nothing(shape, device):
    m, n, width = shape
    owner = torch.full((n,), 0 if m else -1, device=device)
    image_ranks, text_ranks = retrieval_ranks(
        torch.zeros(m, width, device=device), torch.zeros(n, width, device=device), text_image=owner
    )
    # of no dimensions, all scores are 0
    assert image_ranks.tolist() == ([0, -1, -1] if width == 0 else [-1] * m)
    assert text_ranks.tolist() == ([2] * 4 if width == 0 else [-1] * n)


@pytest.mark.skipif(LEG != "cpu", reason="the kernels compute in float32")
def test_float64_sees_what_float32_cannot():
    image, text = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    assert retrieval_ranks(image, text)[1].tolist() == [1, 0]
    assert retrieval_ranks(image.float(), text.float())[1].tolist() == [1, 1]


def test_registration(device):
    inputs = rank_inputs((7, 11, 6), torch.float32, device)
    torch.library.opcheck(torch.ops.clipfast.retrieval_ranks.default, tuple(inputs.values()))
    on_meta = retrieval_ranks(**{name: x.to("meta") for name, x in inputs.items()})
    assert [(x.shape, x.dtype, x.device.type) for x in on_meta] == [((n,), torch.int64, "meta") for n in (7, 11)]


def test_compiles_once_without_a_break(device):
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(lambda inputs: retrieval_ranks(**inputs), backend=backend, fullgraph=True, dynamic=True)
    for shape in ((7, 11, 6), (9, 23, 6), (20, 31, 6)):
        inputs = rank_inputs(shape, torch.float32, device)
        assert same(compiled(inputs), retrieval_ranks(**inputs))
    assert len(graphs) == 1


def test_features_that_require_gradients(device):
    inputs = rank_inputs((7, 11, 6), torch.float32, device)
    before = {name: x.clone() for name, x in inputs.items()}
    expected = retrieval_ranks(**inputs)
    for name in ("image", "text"):
        inputs[name].requires_grad_()
    for backend in ("auto", "torch"):
        ranks = retrieval_ranks(**inputs, backend=backend)
        assert same(ranks, expected)
        assert not any(x.requires_grad for x in ranks)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_autocast_changes_nothing(device):
    # In bfloat16 these would tie.
    image = torch.tensor([[1.0], [1.001]], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert retrieval_ranks(image, torch.ones(2, 1, device=device))[1].tolist() == [1, 0]


@pytest.mark.skipif(INTERPRET or ON_GPU, reason="compiles from recorded CPU calls")
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", [name for name in shipped_cases() if name.startswith("retrieval_ranks")])
def test_both_kernels_multiply_alike(case, arch):
    # The own scores tie with their duplicates only if both kernels sum them by the same instructions.
    instructions = []
    for launch in offline.record(arch, shipped_cases()[case]):
        ptx = offline.compile_kernel(launch, arch).asm["ptx"]
        instructions.append(set(re.findall(r"\b(?:wgmma\.mma|mma\.sync|tcgen05\.mma|fma\.|mul\.\S*f32)\S*", ptx)))
    own, all_others = instructions
    assert own == all_others != set()
