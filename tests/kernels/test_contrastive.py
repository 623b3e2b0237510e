"""The contrastive losses beyond their specifications: shapes, blocks, exactness, and what counts as a negative."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from clipfast import kernels
from clipfast.kernels import info_nce_loss, launch, nt_xent_loss, reference
from clipfast.kernels.contrastive import cpu_blocks, triton_blocks
from clipfast.kernels.contrastive.cases import LossShape, QueueShape, SigmoidShape, ViewShape
from clipfast.kernels.contrastive.sigmoid_kernels import _exp_of_minus, _loss_sums, _probability
from clipfast.kernels.contrastive.softmax_stats import SoftmaxStats, pair_losses
from clipfast.verify.rule import value_and_grads

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import compare
from .conftest import call_at
from .test_contrastive_numerics import errors

pytestmark = pytest.mark.usefixtures("poison")
ONE = torch.tensor(1.0)
# Each loss at a size of several small blocks; 150 is no multiple of a tile or of a block.
SHAPES = {
    "contrastive_loss": LossShape(150, 24, 20.0, 0.5),
    "sigmoid_loss": SigmoidShape(150, 24, 20.0, -10.0, 0.5),
    "info_nce_loss": QueueShape(150, 170, 24, 20.0, 0.5, in_batch=True),
    "nt_xent_loss": ViewShape(150, 24, 20.0, 0.5),
}
each_loss = pytest.mark.parametrize("loss", SHAPES)


@pytest.fixture(params=[80, 90] if INTERPRET else [0])
def arch(request, monkeypatch):
    """Take the kernels' configurations of sm_80, which load by pointers, and of sm_90, which load by descriptors."""
    if request.param:
        monkeypatch.setattr(launch, "CPU_ARCH", request.param)
        monkeypatch.setattr(triton_blocks, "RECORDED_MULTIPROCESSORS", 3)  # a program takes several tiles


def call_of(loss, device, dtype=torch.float32, **changed):
    """Return a call of a loss at the size of ``SHAPES`` but for the fields that are changed."""
    return call_at(loss, SHAPES[loss].changed(**changed), device, dtype)


def features_of(inputs):
    """Return the names of the inputs that are features."""
    return [name for name, x in inputs.items() if x.ndim == 2]


assert_equal = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7, equal_nan=True, check_dtype=False)


# Rows, columns and offset of the pairs. The last one has no pairs, like the texts of another process.
RECTANGLES = [(5, 9, 2), (9, 5, -3), (70, 133, 60), (133, 70, -40), (1, 6, 5), (65, 64, -1)]
RECTANGLES += [(0, 4, 1), (4, 0, 1), (67, 70, -67)]
NUMBERS = {"contrastive_loss": {"logit_scale": 30.0}, "sigmoid_loss": {"logit_scale": 10.0, "logit_bias": -3.0}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "offset"), RECTANGLES, ids=str)
@pytest.mark.parametrize("loss", NUMBERS)
def test_rectangular(loss, m, n, offset, dtype, device, arch):
    numbers = {name: torch.tensor(value, device=device) for name, value in NUMBERS[loss].items()}
    draws = []  # luck evens out only among many rows
    few_rows = 30 if loss == "sigmoid_loss" else 6
    for _ in range(few_rows if min(m, n) < 10 else 2):
        image, text = (F.normalize(torch.randn(rows, 24), dim=-1).to(device, dtype) for rows in (m, n))
        draws.append({"image": image, "text": text, **numbers})
    op, expected = (functools.partial(getattr(module, loss), offset=offset) for module in (kernels, reference))
    compare(op, expected, draws, ONE)


@pytest.mark.skipif(INTERPRET, reason="test_cases.py has several blocks of the kernels")
@pytest.mark.parametrize("scale", [20.0, 1e4], ids=["shared", "online"])
@each_loss
def test_blocks_add_up(loss, scale, device, monkeypatch):
    call = call_of(loss, device, scale=scale)
    expected = call.results()
    monkeypatch.setattr(cpu_blocks, "CHUNK_ELEMENTS", 17 * 150)
    monkeypatch.setattr(cpu_blocks, "PIECE_ELEMENTS", 4 * 150)
    with triton_blocks.small_blocks(64):
        assert_equal(call.results(), expected, atol=1e-7 * scale)


@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalized"])
def test_saving_memory_changes_nothing(normalize, device, arch):
    call = call_of("contrastive_loss", device, normalize=normalize)
    with triton_blocks.small_blocks(64):
        saving = value_and_grads(functools.partial(call.op, memory="min"), call.inputs, call.grads)
        assert_equal(saving, call.results())


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda x: torch.tensor([x])], ids=["float", "scalar", "vector"])
@each_loss
def test_kinds_of_numbers(loss, kind, device):
    op, _, inputs, _ = call_of(loss, device, pairs=20)
    expected = op(**inputs)
    for name in inputs.keys() & {"logit_scale", "logit_bias"}:
        number = kind(inputs[name].item())
        inputs[name] = number.to(device) if isinstance(number, torch.Tensor) else number
    assert torch.equal(op(**inputs), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_loss
def test_not_finite_features_are_not_hidden(loss, bad, device):
    op, _, inputs, _ = call_of(loss, device, pairs=20)
    for name in features_of(inputs):
        wrong = inputs[name].clone()
        wrong[3, 5] = bad
        assert not op(**inputs | {name: wrong}).isfinite(), name


@pytest.mark.parametrize("in_batch", [True, False], ids=["in batch", "queue only"])
def test_empty_queue(in_batch, device):
    call = call_of("info_nce_loss", device, pairs=7, in_batch=in_batch)
    call.inputs["negatives"] = call.inputs["negatives"][:0]
    assert_equal(call.results(), call.truth(), atol=1e-6)


def test_queue_of_the_other_keys_is_the_batch(device):
    # The key itself cannot be in the queue: it would be a negative of itself.
    query, key = (F.normalize(torch.randn(2, 16, device=device), dim=-1) for _ in range(2))
    parts = [
        info_nce_loss(query[i : i + 1], key[i : i + 1], 20.0, negatives=key[1 - i : 2 - i], in_batch=False)
        for i in range(2)
    ]
    torch.testing.assert_close(info_nce_loss(query, key, 20.0), sum(parts) / 2, rtol=1e-6, atol=0)


def test_a_view_is_not_its_own_negative(device):
    # All views alike: 2N - 1 candidates, the positive among them. With itself there would be 2N.
    ones = F.normalize(torch.ones(50, 16), dim=-1).to(device)
    assert nt_xent_loss(ones, ones, 100.0).item() == pytest.approx(math.log(99), rel=1e-6)


def test_zero_rows_when_normalized(device):
    # The gradient of a zero row is 10^12 times as large as the others, in PyTorch too.
    call = call_of("contrastive_loss", device, matched=0.0, normalize=True)
    call.inputs["image"][3] = 0
    call.inputs["text"][[3, 7]] = 0
    found = call.results()
    assert all(value.isfinite().all() for value in found.values())
    assert_equal(found, call.truth(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cosine", [-1.0, -0.9, -0.5, 0.0, 1.0])
def test_any_cosine_at_scale_100(cosine, device):
    # All images alike and all texts alike: at -1 every term of the shared shift underflows.
    call = call_of("contrastive_loss", device, pairs=40, embed_dim=16, scale=100.0)
    for name, components in (("image", [1.0, 0.0]), ("text", [cosine, (1 - cosine**2) ** 0.5])):
        call.inputs[name].zero_()[:, :2] = torch.tensor(components)
    result = call.results()
    assert result["value"].item() == pytest.approx(math.log(40), rel=1e-6)
    assert_equal(result, call.truth(), atol=1e-5)


@pytest.mark.parametrize(("scale", "is_shared"), [(14.3, 1), (78.0, 1), (100.0, 1), (1e4, 0)])
def test_shared_shift_is_taken_where_it_is_exact(scale, is_shared, device):
    inputs = call_of("contrastive_loss", device, pairs=100, embed_dim=64, scale=scale, matched=0.3).inputs
    *_, shared = torch.ops.clipfast.contrastive_fwd(*inputs.values(), 0, True, False, torch.float32, False)
    assert shared.item() == is_shared


@pytest.mark.parametrize(
    ("loss", "changed"),
    [
        ("contrastive_loss", {"matched": 0.3}),
        # the bias makes all gradients vanish but those of the pairs
        ("sigmoid_loss", {"matched": 0.9, "bias": -80.0}),
        ("info_nce_loss", {"matched": 0.3, "in_batch": False}),
        ("nt_xent_loss", {"matched": 0.3, "normalize": False}),
    ],
)
def test_late_training_keeps_every_row(loss, changed, device):
    # A positive's probability is nearly 1. Rounded before it is subtracted from 1, it would leave rows without one
    # correct digit.
    call = call_of(loss, device, DTYPES[-1], pairs=129, embed_dim=72, scale=100.0, **changed)
    # loss scaling does the same: otherwise float16 could not hold the gradients
    call = call._replace(grads=(torch.tensor(2.0**14),))
    found = errors(call.results(), call.truth())
    for name in features_of(call.inputs)[:2]:
        worst = found[f"d_{name} row"]
        assert worst < 1e-2, f"{name}: worst row is off by {worst:.1%}"


def test_value_of_the_sigmoid_loss_is_exact(device):
    # At the start of training the loss is a sum of many small terms log(1 + e). If 1 + e were rounded, they would lose
    # digits, and the sum with them.
    call = call_of("sigmoid_loss", device, pairs=129, embed_dim=72, scale=10.0, matched=0.0)
    found = errors(call.results(), call.truth())
    for name, limit in (("value", 3e-7), ("d_logit_bias", 3e-7), ("d_image", 1e-6), ("d_text", 1e-6)):
        assert found[name] < limit, f"{name}: relative error {found[name]:.2e}"


@triton.jit
def _terms_kernel(x_ptr, loss_ptr, probability_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    offs_m, offs_n = tl.arange(0, ROWS), tl.arange(0, COLS)
    logits = tl.load(x_ptr + offs_m[:, None] * COLS + offs_n[None, :])
    e = _exp_of_minus(tl.abs(logits))
    tl.store(loss_ptr + offs_m, tl.sum(_loss_sums(logits, e, ROWS, COLS), 1))
    tl.store(probability_ptr + offs_m[:, None] * COLS + offs_n[None, :], _probability(logits, e))


@pytest.mark.skipif(LEG == "cpu", reason="tests the kernels' own arithmetic")
def test_terms_of_the_sigmoid_loss_keep_their_digits(device):
    # The range reaches from the logits of other rows to those of pairs. A row has logits of one size, so that no larger
    # term hides what the others lose; 0 is among them, where half of the terms take another branch.
    logits = torch.linspace(-70, 70, 64, device=device)[:, None] + torch.linspace(-1.2, 1.2, 64, device=device)
    loss, probability = logits.new_empty(64), torch.empty_like(logits)
    _terms_kernel[(1,)](logits, loss, probability, ROWS=64, COLS=64)
    exact = logits.double()
    # A GPU computes exponentials in base 2, where the logit of 70 is rounded by up to 4e-6.
    torch.testing.assert_close(loss.double(), F.softplus(exact, threshold=1e3).sum(1), rtol=5e-6, atol=0)
    torch.testing.assert_close(probability.double(), exact.sigmoid(), rtol=1e-5, atol=0)
    assert loss[0] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sigmoid_loss_alone_hides_nothing(value, device):
    call = call_of("sigmoid_loss", device)
    call.inputs["text"][70, 3] = value
    with torch.no_grad():
        assert not call.op(**call.inputs).isfinite()


@pytest.mark.skipif(LEG != "cpu", reason="only products on a CPU have this switch")
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_bfloat16_products_leave_the_switch_as_it_was(before, monkeypatch):
    switch, call = torch.backends.mkldnn.matmul, call_of("contrastive_loss", "cpu", torch.bfloat16)
    monkeypatch.setattr(cpu_blocks, "_has_bfloat16", lambda: True)
    seen = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: seen.append(switch.fp32_precision) or 1 / 0)
    was, switch.fp32_precision = switch.fp32_precision, before
    try:
        with pytest.raises(ZeroDivisionError):
            call.op(**call.inputs)
        assert (seen, switch.fp32_precision) == (["bf16"], before)
    finally:
        switch.fp32_precision = was


def test_sigmoid_loss_without_gradients(device):
    # it takes another kernel, and computes no gradient
    call = call_of("sigmoid_loss", device)
    with torch.no_grad():
        alone = call.op(**call.inputs)
    torch.testing.assert_close(alone, call.results()["value"], rtol=1e-6, atol=0)
    if LEG == "cpu":
        for required in (False, True):
            with launch.record_launches(90) as launches, torch.set_grad_enabled(required):
                call.op(**call.inputs | {"image": call.inputs["image"].clone().requires_grad_()})
            names = {item.kernel.__name__ for item in launches}
            assert ("_sigmoid_sums_kernel" in names) is not required
            assert ("_sigmoid_grad_tile_kernel" in names) is required


@pytest.mark.skipif(LEG == "cpu", reason="tests the kernels' own arithmetic")
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("m", "n", "offset"), [(300, 300, 0), (130, 300, 17), (300, 130, -170), (5, 9, 9), (0, 3, 0)])
def test_what_follows_for_pairs(m, n, offset, both, device):
    # Sums from below the normal numbers to nearly the largest, and a pair far ahead of the others or far behind them.
    total = torch.logspace(-44, 38, 23, device=device)
    sums = [total[torch.arange(size, device=device) % 23] for size in (m, n)]
    maxima = [torch.linspace(-90, 90, size, device=device) for size in (m, n)]
    positive = maxima[0] + torch.linspace(-120, 120, m, device=device)
    stats = SoftmaxStats(maxima[0], sums[0], maxima[1], sums[1], positive, torch.ones((), device=device))
    exact = SoftmaxStats(*(part.double() for part in stats))
    found = triton_blocks.pair_losses(stats, offset, both=both)
    for actual, expected in zip(found, pair_losses(exact, offset, both=both), strict=True):
        # a distance of 120 is rounded by up to 4e-6, before which nothing is lost
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-38, equal_nan=True)


@pytest.mark.skipif(LEG == "cpu", reason="tests the kernels' own arithmetic")
def test_what_follows_from_sums_that_are_no_numbers(device):
    # nothing but the pair, a sum that overflowed, and NaN
    total = torch.tensor([0.0, float("inf"), float("nan"), 1.0], device=device)
    zero = torch.zeros(4, device=device)
    stats = SoftmaxStats(zero, total, zero, torch.ones_like(total), zero, torch.ones((), device=device))
    by_kernel, by_torch = (losses(stats, 0, both=False) for losses in (triton_blocks.pair_losses, pair_losses))
    for found, expected in zip(by_kernel, by_torch, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (X[0], r"{1} must have 2 dimensions, got shape \(8,\)"),
        (X[:3], r"{0} and {1} must have the same shape, got \(4, 8\) and \(3, 8\)"),
        (X.half(), "{1} is float16, but {0} is float32"),
    ],
    ids=["dimensions", "shape", "dtype"],
)
@each_loss
def test_errors_name_the_arguments_of_their_own_loss(loss, second, message):
    op, _, inputs, _ = call_of(loss, "cpu")
    names = features_of(inputs)[:2]
    with pytest.raises((TypeError, ValueError), match=f"{loss}: {message.format(*names)}"):
        op(**inputs | dict(zip(names, (X, second), strict=True)))


@pytest.mark.skipif(LEG != "cpu", reason="launches are recorded from CPU tensors")
@pytest.mark.parametrize("arch", [80, 90])
@each_loss
def test_launches_for_features_without_dimensions(loss, arch):
    # tensor descriptors of sm_90 cannot describe a matrix without columns
    call = call_of(loss, "cpu", torch.bfloat16, embed_dim=0)
    with launch.record_launches(arch) as launches:
        call.results()
    assert launches
    assert not any(item.constexprs.get("IS_TMA") for item in launches)


def test_views_in_either_order(device):
    call = call_of("nt_xent_loss", device)
    ours, other = call.results(), call.results(first=call.inputs["second"], second=call.inputs["first"])
    other["d_first"], other["d_second"] = other["d_second"], other["d_first"]
    assert_equal(ours, other)


def test_texts_in_parts_add_up(device):
    # a process that meets the texts of the others one after the other computes this
    call = call_of("sigmoid_loss", device)
    n = len(call.inputs["image"])
    texts = F.normalize(torch.randn(3 * n, call.inputs["text"].shape[1]), dim=-1).to(device)

    def in_parts(image, text, logit_scale, logit_bias):
        own, *others = text.split(n)
        parts = [call.op(image, other, logit_scale, logit_bias, offset=n) for other in others]
        return call.op(image, own, logit_scale, logit_bias) + sum(parts)

    whole = value_and_grads(in_parts, call.inputs | {"text": texts}, ONE)
    turned = call.inputs | {"text": texts.roll(n, 0)}
    again = value_and_grads(functools.partial(call.op, offset=n), turned, ONE)
    again["d_text"] = again["d_text"].roll(-n, 0)
    assert_equal(whole, again)
