"""Test the contrastive losses beyond their cases: shapes, blocks, exactness, and the choice of negatives."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from clipfast import kernels
from clipfast.kernels import contrastive_loss, info_nce_loss, launch, nt_xent_loss, reference, sigmoid_loss
from clipfast.kernels.contrastive import cpu, launches, operands, small_batch
from clipfast.kernels.contrastive.cases import LossShape, QueueShape, SigmoidShape, ViewShape
from clipfast.verify.rule import in_double, judge_fairly, value_and_grads

from ..conftest import DTYPES, INTERPRET, LEG
from .conftest import Recorded, call_at
from .test_cases import hold, specs

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
assert_equal = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7, equal_nan=True, check_dtype=False)


@pytest.fixture
def few_multiprocessors(monkeypatch):
    """Pretend that there are few multiprocessors, so that each program of a loss computes several tiles."""
    monkeypatch.setattr(operands, "RECORDED_MULTIPROCESSORS", 3)


def call_of(loss, device, dtype=torch.float32, **changed):
    """Return a call of a loss op at its size in ``SHAPES``, with some fields changed."""
    return call_at(loss, SHAPES[loss].changed(**changed), device, dtype)


def features_of(inputs):
    """Return the names of those inputs of the contrastive loss that are features."""
    return [name for name, x in inputs.items() if x.ndim == 2]


# Rows and columns of the logits, and the offset of the pairs. The last case has no pairs, like the logits of one
# process's images with the texts of another process.
RECTANGLES = [(5, 9, 2), (70, 133, 60), (133, 70, -40), (1, 6, 5), (0, 4, 1), (67, 70, -67)]
NUMBERS = {"contrastive_loss": {"logit_scale": 30.0}, "sigmoid_loss": {"logit_scale": 10.0, "logit_bias": -3.0}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "offset"), RECTANGLES, ids=str)
@pytest.mark.parametrize("loss", NUMBERS)
def test_rectangular(loss, m, n, offset, dtype, device, few_multiprocessors, monkeypatch):
    # The kernels load float32 features by pointers, and on sm_90 16-bit features by tensor descriptors.
    monkeypatch.setattr(launch, "CPU_ARCH", 80 if dtype == torch.float32 else 90)
    numbers = {name: torch.tensor(value, device=device) for name, value in NUMBERS[loss].items()}
    op, expected = (functools.partial(getattr(module, loss), offset=offset) for module in (kernels, reference))

    def draw(_):
        """Draw features; return the op's, the reference's and the true contrastive loss with gradients."""
        image, text = (F.normalize(torch.randn(rows, 24), dim=-1).to(device, dtype) for rows in (m, n))
        inputs = {"image": image, "text": text, **numbers}
        return *(value_and_grads(op_, inputs, ONE) for op_ in (op, expected)), value_and_grads(
            expected, in_double(inputs), ONE
        )

    judgements, _ = judge_fairly(draw, 2 if INTERPRET else 4, 40)
    for name, judgement in judgements.items():
        assert judgement.passed, f"{name}: {judgement.reason}"


@pytest.mark.parametrize("scale", [20.0, 1e4], ids=["shared", "online"])
@each_loss
def test_blocks_add_up(loss, scale, native, monkeypatch):
    call = call_of(loss, native, scale=scale)
    expected = call.results()
    monkeypatch.setattr(cpu, "BLOCK_ROWS", 17)
    monkeypatch.setattr(cpu, "BLOCK_COLS", 64)
    monkeypatch.setattr(cpu, "PIECE_ELEMENTS", 4 * 150)
    with launches.small_blocks(64):
        assert_equal(call.results(), expected, atol=1e-7 * scale)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("normalize", [False, True], ids=["unit rows", "normalised"])
@pytest.mark.parametrize("loss", NUMBERS)
def test_one_block_and_several_agree(loss, normalize, arch, triton_device, few_multiprocessors, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    call = call_of(loss, triton_device, torch.float32 if arch == 80 else torch.float16, normalize=normalize)
    with launches.small_blocks(64):
        several = call.results()
    assert_equal(call.results(), several, **({} if arch == 80 else {"rtol": 2e-3, "atol": 1e-6}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saving_memory_changes_nothing(dtype, device, few_multiprocessors, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", 90)
    call = call_of("contrastive_loss", device, dtype, normalize=True)
    with launches.small_blocks(64):
        saving = value_and_grads(functools.partial(call.op, memory="min"), call.inputs, call.grads)
        assert_equal(saving, call.results(), **({} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-6}))


@each_loss
def test_kinds_of_numbers(loss, native):
    op, _, inputs, _ = call_of(loss, native, pairs=20)
    expected = op(**inputs)
    names = inputs.keys() & {"logit_scale", "logit_bias"}
    for kind in (torch.Tensor.item, torch.Tensor.clone, lambda x: x[None]):
        assert torch.equal(op(**inputs | {name: kind(inputs[name]) for name in names}), expected)


@each_loss
def test_not_finite_features_are_not_hidden(loss, device):
    op, _, inputs, _ = call_of(loss, device, pairs=20)
    for name in features_of(inputs):
        for bad in (float("nan"), float("inf")):
            wrong = inputs[name].clone()
            wrong[3, 5] = bad
            assert not op(**inputs | {name: wrong}).isfinite(), name


@pytest.mark.parametrize("in_batch", [True, False], ids=["in batch", "queue only"])
def test_empty_queue(in_batch, device):
    call = call_of("info_nce_loss", device, pairs=7, in_batch=in_batch)
    call.inputs["negatives"] = call.inputs["negatives"][:0]
    assert_equal(call.results(), call.truth(), atol=1e-6)


@pytest.mark.parametrize("loss", ["contrastive_loss", "info_nce_loss", "nt_xent_loss"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_shows_without_any_negative(loss, scale, device):
    op, _, inputs, _ = call_of(loss, device, pairs=1)
    logit_scale = torch.tensor(scale, device=device, requires_grad=True)
    inputs = {name: x[:0] if name == "negatives" else x for name, x in inputs.items()}
    value = op(**inputs | {"logit_scale": logit_scale})
    value.backward()
    assert not value.isfinite()
    assert not logit_scale.grad.isfinite()


def test_a_positive_of_minus_infinity_has_an_infinite_loss(device):
    op, reference, inputs, _ = call_of("info_nce_loss", device, pairs=5, in_batch=False)
    inputs["query"], inputs["key"] = inputs["query"].abs(), inputs["key"].clone()
    inputs["key"][3, 5] = float("-inf")
    results, expected = (value_and_grads(one, inputs, ONE) for one in (op, reference))
    assert results["value"] == float("inf")
    for name in ("d_query", "d_negatives"):
        assert torch.equal(results[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("scale", [100.0, 1000.0], ids=["shared", "online"])
@pytest.mark.parametrize("arch", [80, 90])
def test_a_pair_is_rounded_like_the_logits_beside_it(arch, scale, triton_device, monkeypatch):
    # All logits are equal. If that of a pair had another last bit, the loss would be wrong by 1e-6 or more.
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    dtype = torch.float32 if arch == 80 else torch.float16
    first = F.normalize(torch.randn(1, 200), dim=-1)
    second = F.normalize(first + F.normalize(torch.randn(1, 200), dim=-1), dim=-1)  # a cosine of about 0.7
    image, text = (row.to(triton_device, dtype).expand(70, -1).contiguous() for row in (first, second))
    assert contrastive_loss(image, text, scale).item() == pytest.approx(math.log(70), rel=2e-7)
    assert nt_xent_loss(image, image, scale).item() == pytest.approx(math.log(139), rel=2e-7)


def test_zero_rows_when_normalized(device):
    # The gradient of a zero row is 10^12 times as large as the others, in PyTorch too.
    call = call_of("contrastive_loss", device, matched=0.0, normalize=True)
    call.inputs["image"][3] = 0
    call.inputs["text"][[3, 7]] = 0
    found = call.results()
    assert all(value.isfinite().all() for value in found.values())
    assert_equal(found, call.truth(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cosine", [-1.0, -0.5, 0.0, 1.0])
def test_any_cosine_at_scale_100(cosine, device):
    # All images are equal, and all texts are equal. At a cosine of -1, every exponential with the shared shift of the
    # softmax underflows.
    call = call_of("contrastive_loss", device, pairs=40, embed_dim=16, scale=100.0)
    for name, components in (("image", [1.0, 0.0]), ("text", [cosine, (1 - cosine**2) ** 0.5])):
        call.inputs[name].zero_()[:, :2] = torch.tensor(components)
    result = call.results()
    assert result["value"].item() == pytest.approx(math.log(40), rel=1e-6)
    assert_equal(result, call.truth(), atol=1e-5)


# Stages of training, each with a scale and with the number of standard deviations by which the cosine of a pair exceeds
# that of random features. With a smaller number in the middle, the gradient of the scale would be nearly zero, and its
# relative error would be meaningless. The last stage has the scale of a trained model with random features.
STAGES = {"start": (14.3, 0.0), "middle": (50.0, 3.0), "end": (100.0, 3.5), "new at 100": (100.0, 0.0)}


def call_in(stage, loss, device):
    """Return a call of a loss op whose features and scale are those of a stage of training."""
    scale, deviations = STAGES[stage]
    cosine = deviations / 8
    matched = cosine / (cosine + (1 - cosine**2) ** 0.5)
    sizes = {"pairs": 129, "embed_dim": 64, "scale": scale, "matched": matched}
    return call_of(loss, device, **sizes, **({"normalize": False} if loss == "nt_xent_loss" else {}))


def errors(ours, truth):
    """Return the relative error of each result of a loss op, and the largest relative error of a row.

    Rows that are much smaller than the largest one are left out, since 16 bits cannot represent both.
    """
    found = {}
    for name, value in ours.items():
        difference = value.double() - truth[name]
        size = truth[name].norm()
        found[name] = (difference.norm() / size).item() if size > 0 else difference.norm().item()
        if value.ndim == 2 and size > 0:
            rows = truth[name].norm(dim=1)
            kept = rows > 1e-3 * rows.max()
            found[f"{name} row"] = (difference.norm(dim=1) / rows)[kept].max().item()
    return found


@pytest.mark.parametrize("stage", STAGES)
@each_loss
def test_16_bit_operands(loss, stage, device, few_multiprocessors, monkeypatch):
    # The features are float32, but their values fit into 16 bits. Under autocast the operands have 16 bits, but the
    # gradients are returned in float32, before they would be rounded. The interpreter has no bfloat16, but float16
    # takes the same path through the kernels.
    monkeypatch.setattr(launch, "CPU_ARCH", 90)
    dtype = torch.float16 if INTERPRET else torch.bfloat16
    call = call_in(stage, loss, device)
    call.inputs.update({name: x.to(dtype).float() for name, x in call.inputs.items() if x.ndim})
    with torch.autocast(device.type, dtype):
        ours = call.results()
    first = f"d_{next(iter(call.inputs))}"
    assert ours[first].dtype == torch.float32
    found = errors(ours, call.truth())
    # The gradient G of the logits is rounded to 16 bits, with an error of up to 2e-3 in bfloat16, and an eighth of that
    # in float16.
    gradient, number = (6e-4, 1.25e-5) if INTERPRET else (2e-3, 1e-4)
    for name, error in found.items():
        limit = {"value": 1e-6, "d_logit_scale": number, "d_logit_bias": number}.get(name, gradient)
        assert error <= (8 * limit if name.endswith(" row") else limit), f"{name}: relative error {error:.1e}"
    if LEG != "cpu":
        # The rounding of the logits' gradient to 16 bits must show. Otherwise the kernels have not run.
        assert found[first] > 1e-6


@pytest.mark.parametrize(
    ("loss", "changed"),
    [
        ("contrastive_loss", {"matched": 0.3}),
        # With this bias, only the logits of pairs have gradients that are not zero.
        ("sigmoid_loss", {"matched": 0.9, "bias": -80.0}),
        ("info_nce_loss", {"matched": 0.3, "in_batch": False}),
        ("nt_xent_loss", {"matched": 0.3, "normalize": False}),
    ],
)
def test_late_training_keeps_every_row(loss, changed, device):
    # The probability of a positive is nearly 1. If it were rounded before it is subtracted from 1, some rows of the
    # gradient would have no correct digit.
    call = call_of(loss, device, DTYPES[-1], pairs=129, embed_dim=72, scale=100.0, **changed)
    # The upstream gradient is large, as with loss scaling; otherwise float16 could not hold the gradients.
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


def test_sigmoid_loss_without_gradients(device):
    # Without gradients, another kernel computes the loss.
    call = call_of("sigmoid_loss", device)
    with torch.no_grad():
        alone = call.op(**call.inputs)
        assert not call.op(**call.inputs | {"text": call.inputs["text"] * float("nan")}).isfinite()
    torch.testing.assert_close(alone, call.results()["value"], rtol=1e-6, atol=0)


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (X[0], "{1} .*2 dimensions"),
        (X[:3], r"{0} and {1} must have the same shape, got \(4, 8\) and \(3, 8\)$"),
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


by_torch = functools.partial(contrastive_loss, backend="torch")


class TestWhole:
    """Test the losses of a small batch on a CPU, whose logits are all computed at once."""

    @pytest.fixture(autouse=True)
    def as_a_whole(self, monkeypatch, in_blocks):
        """Let the contrastive loss compute all logits of a small batch at once, which ``in_blocks`` prevents."""
        monkeypatch.setattr(small_batch, "MOST_LOGITS", 2**20)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @each_loss
    def test_cases(self, loss, dtype):
        spec = specs()[loss]
        for case in spec.cases:
            if "cpu" in case.legs and 0 < case.shape.elements <= 2**16:
                hold(spec, case, dtype)

    @pytest.mark.parametrize(
        ("scale", "is_whole"), [(0.0, True), (1e-4, True), (1.0, True), (100.0, False), (-1e4, False)]
    )
    def test_it_is_left_to_the_blocks_where_one_shift_is_not_exact(self, scale, is_whole):
        image, text = torch.randn(2, 7, 8)
        inputs = {"image": image, "text": text, "logit_scale": torch.tensor(scale)}
        with Recorded() as mode:
            found = value_and_grads(contrastive_loss, inputs, ONE)
        assert any(op.namespace == "clipfast" for op, *_ in mode.calls) != is_whole
        truth = value_and_grads(by_torch, in_double(inputs), ONE)
        torch.testing.assert_close(in_double(found), truth, rtol=1e-4, atol=1e-5)

    def test_a_pair_whose_power_overflows_keeps_its_gradient(self):
        # e^90 is infinite in float32, while the sum of the other powers, six times e^81, is not.
        x, y = torch.eye(8)[:7], torch.eye(8)[:7].mul(0.1).add(0.9)
        inputs = {"image": x, "text": y, "logit_scale": torch.tensor(90.0)}
        truth = value_and_grads(by_torch, in_double(inputs), ONE)
        torch.testing.assert_close(
            in_double(value_and_grads(contrastive_loss, inputs, ONE)), truth, rtol=1e-3, atol=1e-7
        )

    def test_a_quotient_of_powers_that_overflows_keeps_its_loss(self):
        # The powers e^-45 and e^45 are finite in float32, but their quotient e^90 is not.
        x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        assert contrastive_loss(x, -x, 45.0).item() == pytest.approx(90.0)

    @pytest.mark.parametrize(
        "loss_of", [contrastive_loss, nt_xent_loss, info_nce_loss, functools.partial(sigmoid_loss, logit_bias=-2.0)]
    )
    def test_autocast_in_the_backward_pass_changes_nothing_and_there_is_a_second_derivative(self, loss_of):
        leaf = torch.randn(7, 8, requires_grad=True)
        second = {}
        for backend in ("auto", "torch"):
            loss = loss_of(leaf, leaf.detach().flip(0), logit_scale=2.0, normalize=True, backend=backend)
            (expected,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (second[backend],) = torch.autograd.grad(expected.square().sum(), leaf, retain_graph=True)
            if backend == "auto":
                torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
                with torch.autocast("cpu", torch.bfloat16):
                    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
        torch.testing.assert_close(second["auto"], second["torch"])
