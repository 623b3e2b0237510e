"""Test attention beyond its cases: each family of kernels at every length, exact properties, strides, errors.

``test_cases.py`` runs the cases of the specifications with the kernels that the tables choose.
"""

import dataclasses
import functools

import pytest
import torch

from clipfast.kernels import attention, attention_qkv, attention_route, configs, launch
from clipfast.kernels.attention import launches
from clipfast.kernels.attention.spec import AttentionShape
from clipfast.kernels.configs import NUM_KEYS, ShortConfig
from clipfast.kernels.spec import DETERMINISM, INTERPRETER, Case, specs
from clipfast.verify.rule import FORWARD

from ..conftest import DTYPES, INTERPRET
from ..numerics import as_good_as_torch, compare
from .conftest import call_at, needs_sanitizer
from .test_cases import hold

pytestmark = pytest.mark.usefixtures("poison")

# Lengths just below, at and just above each length at which the kernels change; the specification has a case of length
# 1.
LENGTHS = (15, 16, 17, 49, 50, 63, 64, 65, 77, 145, 196, 197, 255, 256, 257, 272, 273, 577, 730)
HEAD_DIMS = (8, 64, 80, 88, 104)
QUICK_LENGTHS = (16, 50, 65, 77, 197, 257, 273)
FAMILIES = ("short", "unrolled", "looped")
RUN = FAMILIES if INTERPRET else ("auto",)
by_each_family = pytest.mark.parametrize("kernels", RUN, indirect=True)
either_mask = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def each_size(families, is_quick):
    """Return parameters for every family of attention kernels with every length and head dimension.

    Parameters that are not quick are marked as slow. The families "short" and "unrolled", which hold a whole head, are
    left out at lengths above the most that they can hold.
    """
    sizes = [
        pytest.param(family, n, d, marks=[] if is_quick(n, d) else pytest.mark.slow)
        for family in families
        for n in LENGTHS
        for d in HEAD_DIMS
        if n <= NUM_KEYS[-1] or family in ("looped", "auto")
    ]
    return pytest.mark.parametrize(("kernels", "length", "head_dim"), sizes, indirect=["kernels"])


@pytest.fixture
def kernels(request, monkeypatch):
    """Let attention run the family of kernels that a test asks for: those for a whole head, or the looped ones.

    A head that is too long for the kernels that hold it is computed by the looped ones.
    """

    def whole_head(kernel, arch, dtype, head_dim, n):
        """Return a configuration of the attention kernels that hold a whole head; None where others must be used."""
        if n > NUM_KEYS[-1] or (kernel == "attention_unrolled_bwd" and request.param != "unrolled"):
            return None
        # With blocks of 64 rows, a head of 77 rows has one full block, and one of few rows.
        return ShortConfig(64 if kernel == "attention_unrolled_bwd" else 32, num_warps=4, num_stages=1)

    if request.param != "auto":
        monkeypatch.setattr(launches, "short_config", (lambda *args: None) if request.param == "looped" else whole_head)


def problem(*shape, device, dtype=torch.float32, **options):
    """Return a call of attention on a projection without a bias."""
    return call_at("attention", AttentionShape(*shape, bias=False), device, dtype, **options)


def cases_by_family():
    """Yield the cases of both attention ops that run interpreted, with each family of kernels that hold a whole head.

    In float32 the tables choose the looped kernels, so test_cases.py covers the looped ones.
    """
    for spec in (specs()["attention"], specs()["attention_qkv"]):
        for number, case in enumerate(spec.cases):
            if INTERPRETER in case.legs and case.check != DETERMINISM:
                marks = [pytest.mark.slow] if case.shape.elements > 2**16 else []
                for kernels in ("short", "unrolled"):
                    label = f"{spec.name}-{number} {case.name}-{kernels}"
                    yield pytest.param(spec, case, kernels, id=label, marks=marks)


@pytest.mark.parametrize(("spec", "case", "kernels"), [*cases_by_family()], indirect=["kernels"])
def test_case_by_each_family(spec, case, kernels, interpreted):
    # The specification gives some cases many draws, because they may fail by chance on the CPU path. Two draws are
    # enough for the interpreter.
    hold(spec, dataclasses.replace(case, draws=min(case.draws, 2)), "float16")


def hold_one_head(length, head_dim, causal, dtype):
    """Check attention of a single head by the rule for errors."""
    shape = AttentionShape(1, length, 1, head_dim, causal, bias=False)
    # With few numbers, PyTorch's largest error may be small by chance.
    draws = 3 if head_dim == 8 else 1
    hold(specs()["attention"], Case(shape, "strides of transposed inputs", layout="transposed", draws=draws), dtype)


@either_mask
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
@each_size(RUN, lambda n, d: n in QUICK_LENGTHS and (d == 64 or n == 50))
def test_every_length(length, head_dim, causal, dtype, kernels, device):
    hold_one_head(length, head_dim, causal, dtype)


@needs_sanitizer
class TestSanitized:
    @each_size(FAMILIES, lambda n, d: (n, d) in {(50, 88), (77, 64)})
    def test_each_family(self, length, head_dim, kernels, sanitizer):
        hold_one_head(length, head_dim, length % 2 == 1, "bfloat16")  # odd lengths have the causal mask

    @pytest.mark.parametrize("shape", [(1, 290, 1, 16, True), (1, 300, 1, 80, False), (1, 290, 1, 64, False)], ids=str)
    def test_blocks_through_descriptors(self, shape, sanitizer, monkeypatch):
        monkeypatch.setattr(launch, "CPU_ARCH", 90)
        # Without this, the kernel waits for products by inline assembly, which the sanitizer ttsem cannot execute.
        monkeypatch.setattr(launches, "_is_held", lambda arch, dtype: False)
        spec = specs()["attention"]
        with spec.small_tiles(torch.bfloat16):
            hold(spec, Case(AttentionShape(*shape, bias=False), "blocks come through descriptors"), "bfloat16", draws=1)


@pytest.mark.parametrize(("length", "causal"), [(50, False), (70, True)])
@by_each_family
def test_nothing_behind_the_end_counts(length, causal, device, kernels):
    seqlens = torch.tensor([2**32 + 5, 1, -1, 37], device=device)
    call = problem(4, length, 1, 16, causal, device=device, seqlens=seqlens)
    compare(*call)
    result = call.results()
    assert not result["value"][2].any()
    assert not result["d_qkv"][2].any()
    # Even NaN in rows of keys and values behind the end of a sequence must not have an effect.
    call.inputs["qkv"][3, 37:, 16:] = float("nan")
    poisoned = call.results()
    assert torch.equal(poisoned["value"][3, :37], result["value"][3, :37])
    assert not poisoned["d_qkv"][3, 37:, 16:].any()


@by_each_family
def test_scale(device, kernels):
    compare(*problem(2, 50, 2, 16, device=device, scale=0.01))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 50, 2, 24, False), DTYPES[-1]), ((2, 77, 1, 80, True), torch.float32)], ids=str
)
@by_each_family
def test_gradient_of_the_bias(shape, dtype, device, kernels):
    call = problem(*shape, dtype=dtype, device=device)
    plain = call.results()
    # The bias is float32: its gradient is summed in float32 from gradients that are not rounded yet.
    call.inputs["bias"] = torch.randn(call.inputs["qkv"].shape[-1]).to(device)
    compare(*call)
    result = call.results()
    assert all(torch.equal(result[name], value) for name, value in plain.items())
    assert not result["d_bias"].chunk(3)[1].any()


def test_registration_with_a_bias(native):
    # The shapes in test_registration.py have no bias, since gradcheck would expect another gradient of the bias.
    inputs = call_at("attention", AttentionShape(2, 9, 2, 8, lengths=True), native).inputs
    qkv, bias = (inputs[name].requires_grad_() for name in ("qkv", "bias"))
    torch.library.opcheck(torch.ops.clipfast.attention_fwd.default, (qkv, bias, inputs["seqlens"].int(), 2, True, 0.5))


def test_pytorch_serves_what_the_table_says(triton_device):
    key = configs.config_key("attention_sdpa", torch.float32, 16)
    with configs.override(key, configs.SdpaConfig(min_keys=50, min_keys_causal=51)):
        for length, causal in ((50, False), (49, False), (50, True), (51, True)):
            route = attention_route(launch.arch_of(triton_device), torch.float32, 16, length, causal=causal)
            assert (route.forward == "sdpa") == (length >= 50 + causal)
            call = problem(2, length, 2, 16, causal, device=triton_device)
            call.inputs["bias"] = torch.randn(96, device=triton_device)
            compare(*call)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(
    "shape",
    [(1, 77, 1, 64, True), (2, 197, 2, 64, False), (2, 150, 1, 104, True)],
    ids=str,
)
def test_configurations_of_other_architectures(shape, arch, interpreted, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    call = problem(*shape, dtype=torch.float16, device=interpreted)
    call.inputs["bias"] = torch.randn(call.inputs["qkv"].shape[-1])
    compare(*call)


@by_each_family
def test_scores_of_minus_infinity(device, kernels):
    # All scores of the first tile of keys are -inf, and so is their maximum. Their difference must not become NaN.
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


@pytest.mark.parametrize("shape", [(2, 50, 3, 64, False), (1, 77, 2, 80, True), (1, 257, 1, 16, False)], ids=str)
@pytest.mark.parametrize("kernels", ["short"], indirect=True)
def test_whole_heads_are_read_and_written_once(shape, kernels, moved):
    op, _, inputs, grads = problem(*shape, dtype=torch.float16, device="cpu")
    batch, length, heads, *_ = shape
    log_sums = 4 * batch * heads * length
    floor = functools.partial(specs()["attention"].floor, AttentionShape(*shape), 2)
    out = op(inputs["qkv"].requires_grad_())
    assert sum(moved) == floor(backward=False).bytes + log_sums
    moved.clear()
    out.backward(*grads)
    assert sum(moved) == floor(backward=True).bytes + log_sums


@pytest.mark.parametrize("blocks", [((16, 32), (64, 16)), ((64, 16), (16, 32))], ids=str)
@pytest.mark.parametrize("kernels", ["looped"], indirect=True)
def test_blocks_of_the_two_phases_may_differ(blocks, interpreted, kernels):
    call = problem(2, 70, 1, 16, True, device=interpreted)
    call.inputs["bias"] = torch.randn(48)
    entries = zip(("attention_query_bwd", "attention_key_bwd"), blocks, strict=True)
    changed = {
        configs.config_key(kernel, torch.float32, 16): configs.LoopedConfig(*block, num_warps=4, num_stages=1)
        for kernel, block in entries
    }
    with configs.overrides(changed):
        compare(*call)


QKV, Q = torch.zeros(2, 5, 48), torch.zeros(2, 5, 2, 8)


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        (attention, (QKV[0], 2), {}, "qkv .*3 dimensions"),
        (attention, (QKV, 5), {}, "got 48 with num_heads=5"),
        (attention, (QKV, 2.0), {}, "num_heads .*got float"),
        (attention, (QKV, 2), {"bias": torch.zeros(47)}, r"bias must be \[48\]"),
        (attention, (torch.zeros(1, 2, 408), 1), {}, "at most 128, got 136"),
        (attention_qkv, (Q[0], Q, Q), {}, "q .*4 dimensions"),
        (attention_qkv, (Q, Q, Q.half()), {}, "v is float16"),
        (attention_qkv, (Q, Q, Q[:, :3]), {}, r"got .* and \(2, 3, 2, 8\)"),
        (attention_qkv, (Q[..., :0],) * 3, {}, r"D of at least 1"),
        (attention_qkv, (Q, Q, Q), {"scale": -1.0}, "scale .*got -1.0"),
        (attention_qkv, (Q, Q, Q), {"seqlens": torch.tensor([5])}, r"seqlens must be \[2\]"),
    ],
)
def test_errors(op, arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{op.__name__}: .*{message}"):
        op(*arguments, **options)
