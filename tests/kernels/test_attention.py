"""Attention: both families of kernels at every length, exact properties, strides, and its own errors.

``test_cases.py`` runs the cases of the specifications with the kernels that the tables choose.
"""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import attention, attention_qkv, configs, launch
from clipfast.kernels.attention import launches
from clipfast.kernels.attention.spec import AttentionShape
from clipfast.kernels.configs import NUM_KEYS, ShortConfig
from clipfast.kernels.spec import DETERMINISM, INTERPRETER, Case, specs
from clipfast.verify.rule import FORWARD, value_and_grads

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import as_good_as_torch, compare
from .conftest import call_at, needs_sanitizer
from .test_cases import hold

pytestmark = pytest.mark.usefixtures("poison")

# one below, at and above every width at which something changes, and CLIP's own; test_one_token has the length 1
LENGTHS = (15, 16, 17, 49, 50, 63, 64, 65, 77, 145, 196, 197, 255, 256, 257, 272, 273, 577, 730)
HEAD_DIMS = (8, 64, 80, 88, 104)
FAMILIES = ("short", "unrolled", "looped")
QUICK_SIZES = {(50, 8), (50, 88), (77, 64), (257, 64)}  # of the sanitizer
either_mask = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def each_size(families, is_quick):
    """Every family with every length and head dimension; what is not quick is marked as slow.

    Heads that are too long to be held are walked, whichever family is asked for: one length shows that it is so.
    """
    every = [
        (family, n, d)
        for family in families
        for n in LENGTHS
        for d in HEAD_DIMS
        if n <= NUM_KEYS[-1] + 1 or family in ("looped", "auto")
    ]
    params = [pytest.param(*one, marks=[] if is_quick(*one[1:]) else pytest.mark.slow) for one in every]
    return pytest.mark.parametrize(("kernels", "length", "head_dim"), params, indirect=["kernels"])


@pytest.fixture
def kernels(request, monkeypatch):
    """Choose the kernels that hold a head, up to the lengths that they serve, or those that walk it."""

    def whole_head(kernel, arch, dtype, head_dim, n):
        if n > NUM_KEYS[-1] or (kernel == "attention_unrolled_bwd" and request.param != "unrolled"):
            return None
        # 77 rows are one block of 64 and a few more
        return ShortConfig(64 if kernel == "attention_unrolled_bwd" else 32, num_warps=4, num_stages=1)

    if request.param != "auto":
        monkeypatch.setattr(launches, "short_config", (lambda *args: None) if request.param == "looped" else whole_head)


RUN = FAMILIES if INTERPRET else ("auto",)
by_each_family = pytest.mark.parametrize("kernels", RUN, indirect=True)


def problem(*shape, device, dtype=torch.float32, **options):
    """A call on a projection without a bias."""
    return call_at("attention", AttentionShape(*shape, bias=False), device, dtype, **options)


def cases_by_family():
    """The cases of both specifications that are small enough for the interpreter to run them by each family."""
    found = []
    for spec in (specs()["attention"], specs()["attention_qkv"]):
        for number, case in enumerate(spec.cases):
            if INTERPRETER not in case.legs or case.check == DETERMINISM:
                continue
            marks = [pytest.mark.slow] if case.shape.elements > 2**16 else []
            # looped kernels in float32 are what the tables choose for test_cases.py
            for kernels, dtype in (
                ("short", "float32"), ("short", "float16"), ("unrolled", "float16"), ("looped", "float16"),
            ):  # fmt: skip
                # Float32 ships with the looped kernels alone. The backward pass of the short ones sums the scores in
                # another order than the forward pass, which float32 shows where scores are hundreds.
                if (kernels, dtype, spec.name, case.values) != ("short", "float32", "attention_qkv", "one-hot"):
                    label = f"{spec.name}-{number} {case.name}-{kernels}-{dtype}"
                    found.append(pytest.param(spec, case, kernels, dtype, id=label, marks=marks))
    return found


@pytest.mark.skipif(not INTERPRET, reason="PyTorch's is the only path on a CPU; on a GPU the tables choose")
@pytest.mark.parametrize(
    ("spec", "case", "kernels", "dtype"), cases_by_family() if INTERPRET else [], indirect=["kernels"]
)
def test_case_by_each_family(spec, case, dtype, kernels):
    # many draws are for rare misfortunes of the CPU path
    hold(spec, dataclasses.replace(case, draws=min(case.draws, 2)), dtype)


@either_mask
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@by_each_family
def test_one_token(head_dim, dtype, causal, device, kernels):
    # The output is the value; gradients of query and key are zero, but for the rounding of two sums that cancel.
    call = problem(3, 1, 1, head_dim, causal, dtype=dtype, device=device)
    (q, k, v), (grad,) = call.inputs["qkv"].chunk(3, dim=-1), call.grads
    result = call.results()
    dq, dk, dv = result["d_qkv"].chunk(3, dim=-1)
    assert torch.equal(result["value"], v)
    assert torch.equal(dv, grad)
    rounding = torch.finfo(torch.float32).eps * (grad * v).abs().sum(-1, dtype=torch.float32)
    for gradient, other in ((dq, k), (dk, q)):
        assert (gradient.abs().amax(-1) <= rounding * other.abs().amax(-1)).all()


def hold_one_head(length, head_dim, causal, dtype):
    shape = AttentionShape(1, length, 1, head_dim, causal, bias=False)
    # of few numbers, PyTorch's largest error is small by chance
    draws = 3 if head_dim == 8 else 1
    hold(specs()["attention"], Case(shape, "no stride is easy", layout="transposed", draws=draws), dtype)


@either_mask
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
@each_size(RUN, lambda n, d: d == 64 or n in (50, 77))
def test_every_length(length, head_dim, causal, dtype, kernels):
    hold_one_head(length, head_dim, causal, dtype)


@either_mask
@each_size(FAMILIES, lambda n, d: (n, d) in QUICK_SIZES)
class TestSanitized:
    pytestmark = needs_sanitizer

    def test_each_family(self, length, head_dim, causal, kernels, sanitizer):
        hold_one_head(length, head_dim, causal, "bfloat16")


class TestSanitizedDescriptors:
    pytestmark = needs_sanitizer

    @pytest.mark.parametrize("shape", [(1, 290, 1, 16, True), (2, 300, 1, 80, False)], ids=str)
    def test_walks(self, shape, sanitizer, monkeypatch):
        monkeypatch.setattr(launch, "CPU_ARCH", 90)
        monkeypatch.setattr(launches, "_is_held", lambda x: False)  # ttsem has no inline assembly
        spec = specs()["attention"]
        with spec.small_tiles(torch.bfloat16):
            hold(spec, Case(AttentionShape(*shape, bias=False), "blocks come through descriptors"), "bfloat16", draws=1)


@either_mask
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(2, 33), (50, 17), (17, 130)], ids=str)
@by_each_family
def test_each_tensor_has_strides_of_its_own(m, n, causal, dtype, device, kernels):
    # heads first, heads last, and a slice of something wider
    q = torch.randn(2, 2, m, 24).to(device, dtype).transpose(1, 2)
    k = torch.randn(2, n, 2, 24).to(device, dtype)
    v = torch.randn(2, n, 2, 48).to(device, dtype)[..., ::2]
    grad = torch.randn(2, m, 2, 24).to(device, dtype)
    op = functools.partial(attention_qkv, causal=causal)
    expected = value_and_grads(op, {"q": q.contiguous(), "k": k, "v": v.contiguous()}, grad)
    torch.testing.assert_close(value_and_grads(op, {"q": q, "k": k, "v": v}, grad), expected)


@pytest.mark.parametrize(("length", "causal"), [(50, False), (70, True)])
@by_each_family
def test_nothing_behind_the_end_counts(length, causal, device, kernels):
    seqlens = torch.tensor([2**32 + 5, 1, -1, 37], device=device)
    call = problem(4, length, 1, 16, causal, device=device, seqlens=seqlens)
    compare(*call)
    result = call.results()
    assert not result["value"][2].any()
    assert not result["d_qkv"][2].any()
    # not even as NaN
    call.inputs["qkv"][3, 37:, 16:] = float("nan")
    poisoned = call.results()
    assert torch.equal(poisoned["value"][3, :37], result["value"][3, :37])
    assert not poisoned["d_qkv"][3, 37:, 16:].any()


@pytest.mark.parametrize("scale", [0.01, 1.0])
@by_each_family
def test_scale(scale, device, kernels):
    compare(*problem(2, 50, 2, 16, device=device, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 2, 24, False), (2, 77, 1, 80, True), (1, 140, 1, 16, False)], ids=str)
@by_each_family
def test_gradient_of_the_bias(shape, dtype, device, kernels):
    call = problem(*shape, dtype=dtype, device=device)
    plain = call.results()
    # in float32, in which it is added up from gradients that are not rounded yet
    call.inputs["bias"] = torch.randn(call.inputs["qkv"].shape[-1]).to(device)
    compare(*call)
    result = call.results()
    assert all(torch.equal(result[name], value) for name, value in plain.items())
    assert not result["d_bias"].chunk(3)[1].any()


def test_registration_with_a_bias(device):
    # the shapes that test_registration.py uses have none, since gradcheck would not find the gradient that it gets
    inputs = call_at("attention", AttentionShape(2, 9, 2, 8, lengths=True), device).inputs
    qkv, bias = (inputs[name].requires_grad_() for name in ("qkv", "bias"))
    torch.library.opcheck(torch.ops.clipfast.attention_fwd.default, (qkv, bias, inputs["seqlens"].int(), 2, True, 0.5))


@pytest.mark.skipif(LEG == "cpu", reason="PyTorch's is the only path on a CPU")
def test_pytorch_serves_what_the_table_says(device, monkeypatch):
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or sdpa(*args, **kw))
    key = configs.config_key("attention_sdpa", torch.float32, 16)
    with configs.override(key, configs.SdpaConfig(min_keys=50, min_keys_causal=51)):
        for length, causal, expected in ((50, False, 1), (49, False, 0), (50, True, 0), (51, True, 1)):
            calls.clear()
            call = problem(2, length, 2, 16, causal, device=device)
            call.inputs["bias"] = torch.randn(96, device=device)
            compare(*call)
            assert len(calls) == expected
        calls.clear()
        qkv = call.inputs["qkv"]
        attention(qkv, 2, causal=True, backend="triton")
        attention(qkv, 2, causal=True, seqlens=torch.tensor([3, 4], device=device))
        assert not calls


@pytest.mark.skipif(not INTERPRET, reason="a GPU has its own architecture")
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 77, 1, 64, True), (1, 65, 1, 80, False), (1, 50, 1, 64, False), (1, 197, 1, 64, False),
        (1, 257, 2, 64, False), (2, 150, 1, 104, True), (1, 300, 1, 64, True),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_of_other_architectures(shape, arch, device, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    compare(*problem(*shape, dtype=torch.float16, device=device))


@by_each_family
def test_scores_of_minus_infinity(device, kernels):
    # a whole first tile has no weight, and its maximum minus itself must not become NaN
    op, expected, inputs, _ = problem(1, 70, 1, 16, device=device)
    qkv = inputs["qkv"]
    qkv[..., :16].abs_()
    qkv[:, :40, 16:32] = float("-inf")
    as_good_as_torch(op(qkv), expected(qkv), expected(qkv.double()), FORWARD, "value")


@by_each_family
def test_nan_stays_in_its_image(device, kernels):
    op, _, inputs, _ = problem(2, 20, 1, 16, device=device)
    inputs["qkv"][0, 3, 20] = float("nan")
    out = op(**inputs)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("shape", [(2, 50, 3, 64, False), (1, 77, 2, 80, True), (1, 257, 1, 16, False)], ids=str)
@pytest.mark.parametrize("kernels", ["short"], indirect=True)
def test_whole_heads_are_read_and_written_once(shape, device, kernels, moved):
    op, _, inputs, grads = problem(*shape, dtype=torch.float16, device=device)
    batch, length, heads, *_ = shape
    log_sums = 4 * batch * heads * length
    floor = functools.partial(specs()["attention"].floor, AttentionShape(*shape), 2)
    out = op(inputs["qkv"].requires_grad_())
    assert sum(moved) == floor(backward=False).bytes + log_sums
    moved.clear()
    out.backward(*grads)
    assert sum(moved) == floor(backward=True).bytes + log_sums


def two_phases(dtype, head_dim, query, key):
    """Rows and columns of the blocks of both kernels."""
    entries = {"attention_query_bwd": query, "attention_key_bwd": key}
    return configs.overrides({
        configs.config_key(kernel, dtype, head_dim): configs.LoopedConfig(*block, num_warps=4, num_stages=1)
        for kernel, block in entries.items()
    })  # fmt: skip


@pytest.mark.skipif(not INTERPRET, reason="only the interpreter tells what is loaded and stored")
@pytest.mark.parametrize("kernels", ["looped"], indirect=True)
def test_delta_is_computed_once(device, kernels, moved):
    batch, length, heads, head_dim, block = 2, 70, 3, 8, 32
    op, _, inputs, grads = problem(batch, length, heads, head_dim, dtype=torch.float16, device=device)
    out = op(inputs["qkv"].requires_grad_())
    moved.clear()
    with two_phases(torch.float16, head_dim, (block, block), (block, block)):
        out.backward(*grads)
    # Each phase reads what its programs own once, and what they walk once for each of their blocks. The first one owns
    # q, o, their gradients and the numbers of each query, the second one k, v and their gradients.
    blocks, tensor = -(-length // block), 2 * batch * length * heads * head_dim
    numbers, padded = (4 * batch * heads * rows for rows in (length, blocks * block))
    queries, keys = (4 + 2 * blocks) * tensor + numbers + 2 * padded, (4 + 2 * blocks) * tensor + 2 * blocks * padded
    assert sum(moved) == queries + keys


@pytest.mark.skipif(not INTERPRET, reason="PyTorch's is the only path on a CPU; on a GPU the tables choose")
@pytest.mark.parametrize("blocks", [((16, 32), (64, 16)), ((64, 16), (16, 32))], ids=str)
@pytest.mark.parametrize("kernels", ["looped"], indirect=True)
def test_blocks_of_the_two_phases_may_differ(blocks, device, kernels):
    call = problem(2, 70, 1, 16, True, device=device)
    call.inputs["bias"] = torch.randn(48, device=device)
    with two_phases(torch.float32, 16, *blocks):
        compare(*call)


QKV, Q = torch.zeros(2, 5, 48), torch.zeros(2, 5, 2, 8)


@pytest.mark.parametrize(
    ("op", "arguments", "options", "error", "message"),
    [
        (attention, (QKV[0], 2), {}, ValueError, r"qkv must have 3 dimensions, got shape \(5, 48\)"),
        (attention, (QKV, 5), {}, ValueError, r"3 \* num_heads \* head_dim, got 48 with num_heads=5"),
        (attention, (QKV, 0), {}, ValueError, "num_heads=0"),
        (attention, (QKV, 2.0), {}, TypeError, "num_heads must be an int, got float"),
        (attention, (QKV, True), {}, TypeError, "num_heads must be an int, got bool"),
        (attention, (QKV, 2), {"causal": "no"}, TypeError, "causal must be a bool, got str"),
        (attention, (QKV, 2), {"bias": torch.zeros(47)}, ValueError, r"bias must be \[48\] on cpu, got \(47,\) on cpu"),
        (attention, (torch.zeros(1, 2, 408), 1), {}, ValueError, "head_dim must be at most 128, got 136"),
        (attention_qkv, (Q[0], Q, Q), {}, ValueError, r"q must have 4 dimensions, got shape \(5, 2, 8\)"),
        (attention_qkv, (Q, Q, Q.half()), {}, TypeError, "v is float16, but q is float32"),
        (attention_qkv, (Q, Q, Q[:, :3]), {}, ValueError, r"v \[B, N, H, D\], .*, got .* and \(2, 3, 2, 8\)"),
        (attention_qkv, (Q[..., :0],) * 3, {}, ValueError, r"with D of at least 1, got \(2, 5, 2, 0\)"),
        (attention_qkv, (Q, Q, Q), {"scale": -1.0}, ValueError, "scale must be positive, got -1.0"),
        (attention_qkv, (Q, Q, Q), {"causal": 1}, TypeError, "causal must be a bool, got int"),
        (attention_qkv, (Q, Q, Q), {"seqlens": torch.tensor([5])}, ValueError, r"seqlens must be \[2\] on cpu, got"),
    ],
)
def test_errors(op, arguments, options, error, message):
    with pytest.raises(error, match=f"^{op.__name__}: .*{message}"):
        op(*arguments, **options)
