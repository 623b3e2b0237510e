"""The contrastive loss: values and gradients, layouts, extremes; and what all losses do with bad or empty features."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from clipfast import kernels
from clipfast.kernels import contrastive_loss, launch, reference
from clipfast.kernels.contrastive import cpu_blocks, triton_blocks

from ..conftest import DTYPES, INTERPRET, LEG
from ..numerics import compare, value_and_grads
from .cases import LOSS_SHAPES, huge_strides, loss_inputs, strided

pytestmark = pytest.mark.usefixtures("poison")
DRAWS = 6


@pytest.fixture(params=[80, 90] if INTERPRET else [0])
def arch(request, monkeypatch):
    """Take the kernels' configurations of sm_80, which load by pointers, and of sm_90, which load by descriptors."""
    if request.param:
        monkeypatch.setattr(launch, "CPU_ARCH", request.param)


def unnormalised(scale, device):
    """Return features of very different lengths."""
    inputs = {"image": 30 * torch.randn(45, 24), "text": 3 * torch.randn(45, 24), "logit_scale": torch.tensor(scale)}
    return {name: x.to(device) for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize(("matched", "scale"), [(0.0, 14.3), (0.2, 50.0), (0.3, 100.0)], ids=["start", "middle", "end"])
def test_value_and_gradients(shape, dtype, matched, scale, device, arch):
    inputs = [loss_inputs(shape, dtype, device, matched=matched, scale=scale) for _ in range(DRAWS)]
    compare(contrastive_loss, reference.contrastive_loss, inputs, torch.tensor(1.0))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    inputs = loss_inputs((67, 40), torch.float32, device, matched=0.5, scale=20.0)
    expected = value_and_grads(contrastive_loss, inputs, torch.tensor(2.5))
    inputs |= {name: strided(inputs[name], layout) for name in ("image", "text")}
    for name, value in value_and_grads(contrastive_loss, inputs, torch.tensor(2.5)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_expanded_features(device):
    # Stride 0: every image is the same, so no gradient can come from choosing between them.
    image = F.normalize(torch.randn(1, 32), dim=-1).to(device).expand(20, 32)
    inputs = {
        "image": image,
        "text": F.normalize(torch.randn(20, 32), dim=-1).to(device),
        "logit_scale": torch.tensor(10.0, device=device),
    }
    compare(contrastive_loss, reference.contrastive_loss, inputs, torch.tensor(1.0))


@pytest.mark.parametrize("scale", [20.0, 1e4], ids=["shared", "online"])
def test_blocks_add_up(scale, device, arch, monkeypatch):
    # Several blocks and several chunks must give what one gives; 300 is no multiple of either.
    inputs = loss_inputs((300, 32), torch.float32, device, matched=0.5, scale=scale)
    expected = value_and_grads(contrastive_loss, inputs, torch.tensor(1.0))
    monkeypatch.setattr(triton_blocks, "STATS_EDGE", 128)
    monkeypatch.setattr(triton_blocks, "_block_edge", lambda x: 128)
    monkeypatch.setattr(cpu_blocks, "CHUNK_ELEMENTS", 17 * 300)
    monkeypatch.setattr(cpu_blocks, "PIECE_ELEMENTS", 4 * 300)
    for name, value in value_and_grads(contrastive_loss, inputs, torch.tensor(1.0)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7 * scale, msg=name)


@pytest.mark.skipif(LEG == "cpu", reason="the CPU path has no tiles")
def test_more_row_tiles_than_a_group(device):
    inputs = loss_inputs((600, 16), torch.float32, device, matched=0.3, scale=20.0)
    compare(contrastive_loss, reference.contrastive_loss, inputs, torch.tensor(1.0))


@pytest.mark.skipif(not INTERPRET, reason="tests how the kernels compute addresses")
def test_offsets_beyond_32_bits():
    image, text = huge_strides((4, 40)), F.normalize(torch.randn(4, 40), dim=-1).half()
    image.copy_(text.flip(0))
    expected = contrastive_loss(text.flip(0), text, 10.0)
    torch.testing.assert_close(contrastive_loss(image, text, 10.0), expected)


@pytest.mark.parametrize("scale", [0.0, 1e4, -30.0], ids=["zero", "huge", "negative"])
def test_extreme_scale(scale, device):
    inputs = [loss_inputs((37, 24), torch.float32, device, matched=0.3, scale=scale) for _ in range(DRAWS)]
    compare(contrastive_loss, reference.contrastive_loss, inputs, torch.tensor(1.0))


def test_unnormalised_features(device):
    # Logits of thousands: a softmax without a running maximum would overflow.
    compare(
        contrastive_loss,
        reference.contrastive_loss,
        [unnormalised(1.0, device) for _ in range(DRAWS)],
        torch.tensor(1.0),
    )


def test_equal_features_give_log_n(device):
    ones = F.normalize(torch.ones(50, 16), dim=-1).to(device)
    assert contrastive_loss(ones, ones, 100.0).item() == pytest.approx(math.log(50), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_features_are_not_hidden(bad, device):
    inputs = loss_inputs((20, 16), torch.float32, device, matched=0.0, scale=10.0)
    inputs["image"][3, 5] = bad
    assert not contrastive_loss(**inputs).isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "offset"), [(5, 9, 2), (9, 5, -3), (70, 133, 60), (133, 70, -40), (1, 6, 5), (65, 64, -1)], ids=str
)
def test_rectangular(m, n, offset, dtype, device, arch):
    inputs = [
        {
            "image": loss_inputs((m, 24), dtype, device, matched=0.0, scale=1.0)["image"],
            "text": loss_inputs((n, 24), dtype, device, matched=0.0, scale=1.0)["image"],
            "logit_scale": torch.tensor(30.0, device=device),
        }
        for _ in range(DRAWS)
    ]
    ours, expected = (functools.partial(fn, offset=offset) for fn in (contrastive_loss, reference.contrastive_loss))
    compare(ours, expected, inputs, torch.tensor(1.0))


def test_offset_without_pairs(device):
    image, text = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device)
    loss = contrastive_loss(image, text, 10.0, offset=7)
    loss.backward()
    assert loss.isnan()
    assert image.grad.shape == image.shape


@pytest.mark.parametrize("normalize", [False, True], ids=["as they are", "normalized"])
def test_saving_memory_changes_nothing(normalize, device, arch, monkeypatch):
    monkeypatch.setattr(triton_blocks, "_block_edge", lambda x: 64)
    inputs = loss_inputs((150, 24), torch.float32, device, matched=0.3, scale=20.0)
    expected = value_and_grads(functools.partial(contrastive_loss, normalize=normalize), inputs, torch.tensor(1.0))
    op = functools.partial(contrastive_loss, normalize=normalize, memory="min")
    for name, value in value_and_grads(op, inputs, torch.tensor(1.0)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_zero_rows_when_normalized(device):
    inputs = unnormalised(50.0, device)
    inputs["image"][3] = 0
    inputs["text"][[3, 7]] = 0
    op, expected = (functools.partial(fn, normalize=True) for fn in (contrastive_loss, reference.contrastive_loss))
    ours = value_and_grads(op, inputs, torch.tensor(1.0))
    truth = value_and_grads(expected, {name: x.double() for name, x in inputs.items()}, torch.tensor(1.0))
    for name, value in ours.items():
        # The gradient of a zero row is 10^12 times as large as the others, in PyTorch too.
        assert value.isfinite().all(), name
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("cosine", [-1.0, -0.9, -0.5, 0.0, 1.0])
def test_any_cosine_at_scale_100(cosine, device):
    # All images alike and all texts alike: at -1 every term of the shared shift underflows.
    image = torch.zeros(40, 16)
    image[:, 0] = 1.0
    text = torch.zeros(40, 16)
    text[:, 0], text[:, 1] = cosine, (1 - cosine**2) ** 0.5
    inputs = {"image": image.to(device), "text": text.to(device), "logit_scale": torch.tensor(100.0, device=device)}
    result = value_and_grads(contrastive_loss, inputs, torch.tensor(1.0))
    assert result["value"].item() == pytest.approx(math.log(40), rel=1e-6)
    truth = value_and_grads(
        reference.contrastive_loss, {name: x.double() for name, x in inputs.items()}, torch.tensor(1.0)
    )
    for name, value in result.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("scale", "is_shared"), [(14.3, 1), (78.0, 1), (100.0, 1), (1e4, 0)])
def test_shared_shift_is_taken_where_it_is_exact(scale, is_shared, device):
    inputs = loss_inputs((100, 64), torch.float32, device, matched=0.3, scale=scale)
    *_, shared = torch.ops.clipfast.contrastive_fwd(*inputs.values(), 0, True, False, torch.float32, False)
    assert shared.item() == is_shared


def test_normalize(device):
    op, expected = (functools.partial(fn, normalize=True) for fn in (contrastive_loss, reference.contrastive_loss))
    compare(op, expected, [unnormalised(20.0, device) for _ in range(DRAWS)], torch.tensor(1.0))


@pytest.mark.parametrize(
    "scale", [10.0, torch.tensor([10.0]), torch.tensor(10.0)], ids=["float", "one element", "scalar"]
)
def test_kinds_of_scale(scale, device):
    inputs = loss_inputs((20, 16), torch.float32, device, matched=0.0, scale=10.0)
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    assert torch.equal(contrastive_loss(inputs["image"], inputs["text"], scale), contrastive_loss(**inputs))


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs one program after the other")
def test_same_bits_every_time(device, two_threads):
    inputs = loss_inputs((129, 72), torch.float32, device, matched=0.5, scale=50.0)
    first = value_and_grads(contrastive_loss, inputs, torch.tensor(1.0))
    for _ in range(5):
        again = value_and_grads(contrastive_loss, inputs, torch.tensor(1.0))
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_late_training_keeps_every_row(device):
    # A positive's probability is nearly 1. Rounded before it is subtracted from 1, it would leave rows without one
    # correct digit.
    dtype = DTYPES[-1]
    inputs = loss_inputs((129, 72), dtype, device, matched=0.3, scale=100.0)
    grad = torch.tensor(2.0**14)  # loss scaling does the same: otherwise float16 could not hold the gradients
    ours = value_and_grads(contrastive_loss, inputs, grad)
    truth = value_and_grads(reference.contrastive_loss, {name: x.double() for name, x in inputs.items()}, grad)
    for name in ("d_image", "d_text"):
        size = truth[name].norm(dim=1)
        error = (ours[name].double() - truth[name]).norm(dim=1) / size
        # Rows smaller than that are below what the dtype of the gradient can hold.
        worst = error[size > 1e-3 * size.max()].max()
        assert worst < 1e-2, f"{name}: worst row is off by {worst:.1%}"


@pytest.mark.skipif(LEG != "cpu", reason="large: the interpreter would take minutes")
def test_acceptance_size_against_float64():
    inputs = loss_inputs((4099, 512), torch.float32, torch.device("cpu"), matched=0.3, scale=14.3)
    ours = value_and_grads(contrastive_loss, inputs, torch.tensor(1.0))
    truth = value_and_grads(
        reference.contrastive_loss, {name: x.double() for name, x in inputs.items()}, torch.tensor(1.0)
    )
    limits = {"value": 1e-6, "d_image": 1e-5, "d_text": 1e-5, "d_logit_scale": 1e-5}
    for name, limit in limits.items():
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < limit, f"{name}: relative error {error:.2e}"


# Each loss with two arguments for features, their names, and its other arguments.
LOSSES = {
    "contrastive_loss": (("image", "text"), {"logit_scale": 10.0}),
    "distributed_contrastive_loss": (("image", "text"), {"logit_scale": 10.0}),
    "sigmoid_loss": (("image", "text"), {"logit_scale": 10.0, "logit_bias": -3.0}),
    "nt_xent_loss": (("first", "second"), {"logit_scale": 10.0}),
    "info_nce_loss": (("query", "key"), {"logit_scale": 10.0}),
    "info_nce_loss of a queue": (("query", "key"), {"logit_scale": 10.0, "negatives": torch.zeros(3, 8)}),
}
ONE_PROCESS = [loss for loss in LOSSES if not loss.startswith("distributed")]
X = torch.zeros(4, 8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("first", "second", "changed", "message"),
    [
        (X.tolist(), X, {}, "{0} must be a torch.Tensor, got list"),
        (X, X[0], {}, r"{1} must have 2 dimensions, got shape \(8,\)"),
        (X, X[:3], {}, r"{0} and {1} must have the same shape, got \(4, 8\) and \(3, 8\)"),
        (X, X.half(), {}, "{1} is float16, but {0} is float32"),
        (X, X.to("meta"), {}, "{1} is on meta, but {0} is on cpu"),
        (X, X, {"logit_scale": torch.ones((), device="meta")}, "logit_scale is on meta, but {0} is on cpu"),
        (X.double(), X.double(), {}, "{0} is float64, which only the CPU path"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_errors_name_the_arguments_of_their_own_loss(loss, first, second, changed, message):
    (names, others), op = LOSSES[loss], loss.split()[0]
    arguments = dict(zip(names, (first, second), strict=True)) | others | changed
    if "negatives" in arguments and isinstance(first, torch.Tensor):
        arguments["negatives"] = arguments["negatives"].to(first)
    # float64 is refused only where the kernels run, which they would do here
    with launch.execute_on_cpu(), pytest.raises((TypeError, ValueError), match=f"{op}: {message.format(*names)}"):
        getattr(kernels, op)(**arguments)


EMPTY = [(loss, rows, rows, width) for loss in ONE_PROCESS for rows, width in ((5, 0), (70, 0), (0, 8))]
EMPTY += [(loss, m, n, 8) for loss in ("contrastive_loss", "sigmoid_loss") for m, n in ((0, 4), (4, 0))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("loss", "m", "n", "width"), EMPTY)
def test_empty_features(loss, m, n, width, dtype, device, arch):
    (names, others), op = LOSSES[loss], loss.split()[0]
    options = {"offset": 1} if m != n else {}
    features = (torch.randn(rows, width).to(device, dtype) for rows in (m, n))
    inputs = dict(zip(names, features, strict=True)) | {
        name: torch.randn(3, width).to(device, dtype) if name == "negatives" else torch.tensor(x, device=device)
        for name, x in others.items()
    }
    fn, expected = (functools.partial(getattr(module, op), **options) for module in (kernels, reference))
    ours = value_and_grads(fn, inputs, torch.tensor(1.0))
    if (op, m, n) == ("contrastive_loss", 4, 0):  # a mean over no pairs, which the reference cannot take
        assert ours["value"].isnan()
        return
    truth = value_and_grads(expected, {name: x.double() for name, x in inputs.items()}, torch.tensor(1.0))
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), truth[name], equal_nan=True, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.skipif(LEG != "cpu", reason="launches are recorded from CPU tensors")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("loss", ONE_PROCESS)
def test_launches_for_features_without_dimensions(loss, arch):
    # tensor descriptors of sm_90 cannot describe a matrix without columns
    (names, others), op = LOSSES[loss], loss.split()[0]
    features = {name: torch.zeros(70, 0, dtype=torch.bfloat16, requires_grad=True) for name in names}
    others = {name: x[:, :0].bfloat16() if isinstance(x, torch.Tensor) else x for name, x in others.items()}
    with launch.record_launches(arch) as launches:
        getattr(kernels, op)(**features, **others).backward()
    assert launches
    assert not any(item.constexprs.get("IS_TMA") for item in launches)
