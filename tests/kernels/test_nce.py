"""InfoNCE with a queue and NT-Xent: values and gradients, what counts as a negative, extremes."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import info_nce_loss, launch, nt_xent_loss, reference
from clipfast.kernels.contrastive import cpu_blocks, triton_blocks

from ..conftest import DTYPES, INTERPRET
from ..numerics import compare, value_and_grads
from .cases import LOSS_SHAPES, loss_inputs, strided

pytestmark = pytest.mark.usefixtures("poison")
ONE = torch.tensor(1.0)
QUEUES = (
    1,
    70,
    64,
    1,
    150,
)  # one for each of LOSS_SHAPES; 70 is more than a tile of float32, 150 more than one of 16 bits


@pytest.fixture
def arch(request, monkeypatch):
    """Load float32 by pointers and 16 bits by descriptors; the tests of the contrastive loss have the other two."""
    if INTERPRET and "dtype" in request.fixturenames:
        monkeypatch.setattr(launch, "CPU_ARCH", 90 if request.getfixturevalue("dtype").itemsize == 2 else 80)


def draws(shape, dtype):
    """Return how many draws to judge as one: many of few rows, since luck evens out only among many rows."""
    return range((30 if dtype.itemsize > 2 else 8) if shape[0] < 10 else 2)


def queue_inputs(shape, queue, dtype, device, *, matched=0.3, scale=20.0):
    """Return queries, their keys, and a queue of other keys."""
    pairs = loss_inputs(shape, dtype, device, matched=matched, scale=scale)
    negatives = F.normalize(torch.randn(queue, shape[1]), dim=-1).to(device, dtype)
    return {"query": pairs["image"], "key": pairs["text"], "negatives": negatives, "logit_scale": pairs["logit_scale"]}


def view_inputs(shape, dtype, device, *, matched=0.3, scale=20.0):
    """Return two views of each image."""
    pairs = loss_inputs(shape, dtype, device, matched=matched, scale=scale)
    return {"first": pairs["image"], "second": pairs["text"], "logit_scale": pairs["logit_scale"]}


def in_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_batch", [True, False], ids=["in batch", "queue only"])
@pytest.mark.parametrize(("shape", "queue"), list(zip(LOSS_SHAPES, QUEUES, strict=True)), ids=str)
@pytest.mark.parametrize(("matched", "scale"), [(0.0, 14.3), (0.3, 100.0)], ids=["start", "end"])
def test_info_nce(shape, queue, in_batch, dtype, matched, scale, device, arch):
    inputs = [queue_inputs(shape, queue, dtype, device, matched=matched, scale=scale) for _ in draws(shape, dtype)]
    op, expected = (functools.partial(fn, in_batch=in_batch) for fn in (info_nce_loss, reference.info_nce_loss))
    compare(op, expected, inputs, ONE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize(("matched", "scale"), [(0.0, 14.3), (0.3, 100.0)], ids=["start", "end"])
def test_nt_xent(shape, dtype, matched, scale, device, arch):
    inputs = [view_inputs(shape, dtype, device, matched=matched, scale=scale) for _ in draws(shape, dtype)]
    compare(nt_xent_loss, reference.nt_xent_loss, inputs, ONE)


@pytest.mark.parametrize("shape", [(11, 8), (67, 40)], ids=str)
def test_info_nce_without_a_queue(shape, device):
    inputs = [queue_inputs(shape, 1, torch.float32, device) for _ in range(2)]
    for draw in inputs:
        del draw["negatives"]
    compare(info_nce_loss, reference.info_nce_loss, inputs, ONE)


@pytest.mark.parametrize("in_batch", [True, False], ids=["in batch", "queue only"])
def test_empty_queue(in_batch, device):
    inputs = queue_inputs((7, 8), 0, torch.float32, device)
    ours = value_and_grads(functools.partial(info_nce_loss, in_batch=in_batch), inputs, ONE)
    truth = value_and_grads(functools.partial(reference.info_nce_loss, in_batch=in_batch), in_double(inputs), ONE)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("scale", [0.0, 1e4, -30.0], ids=["zero", "huge", "negative"])
def test_extreme_scale(scale, device, arch):
    queues = [queue_inputs((37, 24), 50, torch.float32, device, scale=scale) for _ in range(2)]
    for in_batch in (True, False):
        op, expected = (functools.partial(fn, in_batch=in_batch) for fn in (info_nce_loss, reference.info_nce_loss))
        compare(op, expected, queues, ONE)
    views = [view_inputs((37, 24), torch.float32, device, scale=scale) for _ in range(2)]
    compare(nt_xent_loss, reference.nt_xent_loss, views, ONE)


@pytest.mark.parametrize("swapped", [False, True], ids=["queue shared", "batch shared"])
def test_one_block_shared_and_the_other_not(swapped, device, arch):
    # Lengths of the columns differ so much that one block's logits fit the shared shift and the other's do not.
    inputs = [queue_inputs((40, 24), 50, torch.float32, device) for _ in range(6)]
    for draw in inputs:
        draw["negatives" if swapped else "key"] *= 200
    compare(info_nce_loss, reference.info_nce_loss, inputs, ONE)


def test_normalize(device):
    queues = [queue_inputs((45, 24), 50, torch.float32, device) for _ in range(2)]
    for draw in queues:
        draw["query"] *= 30
        draw["negatives"] *= 0.1
    op, expected = (functools.partial(fn, normalize=True) for fn in (info_nce_loss, reference.info_nce_loss))
    compare(op, expected, queues, ONE)
    op, expected = (functools.partial(op, in_batch=False) for op in (op, expected))
    compare(op, expected, queues, ONE)
    views = [view_inputs((45, 24), torch.float32, device) for _ in range(2)]
    for draw in views:
        draw["first"] *= 30
    compare(nt_xent_loss, reference.nt_xent_loss, views, ONE)
    op, expected = (functools.partial(fn, normalize=False) for fn in (nt_xent_loss, reference.nt_xent_loss))
    compare(op, expected, [view_inputs((45, 24), torch.float32, device) for _ in range(2)], ONE)


@pytest.mark.parametrize("scale", [20.0, 1e4], ids=["shared", "online"])
def test_blocks_add_up(scale, device, arch, monkeypatch):
    # Several blocks, strips and chunks must give what one gives; 150 is no multiple of any.
    queue = queue_inputs((150, 24), 170, torch.float32, device, matched=0.5, scale=scale)
    views = view_inputs((150, 24), torch.float32, device, matched=0.5, scale=scale)
    expected = [value_and_grads(op, x, ONE) for op, x in ((info_nce_loss, queue), (nt_xent_loss, views))]
    monkeypatch.setattr(triton_blocks, "STATS_EDGE", 64)
    monkeypatch.setattr(triton_blocks, "_block_edge", lambda x: 64)
    monkeypatch.setattr(cpu_blocks, "CHUNK_ELEMENTS", 17 * 150)
    monkeypatch.setattr(cpu_blocks, "PIECE_ELEMENTS", 4 * 150)
    for op, inputs, once in ((info_nce_loss, queue, expected[0]), (nt_xent_loss, views, expected[1])):
        for name, value in value_and_grads(op, inputs, ONE).items():
            torch.testing.assert_close(value, once[name], rtol=1e-5, atol=1e-7 * scale, msg=name)


def test_queue_of_the_other_keys_is_the_batch(device):
    # The key itself cannot be in the queue: it would be a negative of itself.
    inputs = queue_inputs((2, 16), 1, torch.float32, device)
    first = {**inputs, "query": inputs["query"][:1], "key": inputs["key"][:1], "negatives": inputs["key"][1:]}
    second = {**inputs, "query": inputs["query"][1:], "key": inputs["key"][1:], "negatives": inputs["key"][:1]}
    apart = (info_nce_loss(**first, in_batch=False) + info_nce_loss(**second, in_batch=False)) / 2
    del inputs["negatives"]
    torch.testing.assert_close(info_nce_loss(**inputs), apart, rtol=1e-6, atol=0)


def test_a_view_is_not_its_own_negative(device):
    # All views alike: 2N - 1 candidates, the positive among them. With itself there would be 2N.
    ones = F.normalize(torch.ones(50, 16), dim=-1).to(device)
    assert nt_xent_loss(ones, ones, 100.0).item() == pytest.approx(math.log(99), rel=1e-6)


def test_views_in_either_order(device):
    inputs = view_inputs((67, 40), torch.float32, device)
    swapped = {"first": inputs["second"], "second": inputs["first"], "logit_scale": inputs["logit_scale"]}
    ours, other = (value_and_grads(nt_xent_loss, x, ONE) for x in (inputs, swapped))
    for name, again in (("value", "value"), ("d_first", "d_second"), ("d_logit_scale", "d_logit_scale")):
        torch.testing.assert_close(ours[name], other[again], rtol=1e-5, atol=1e-7)


def test_late_training_keeps_every_row(device):
    # The probability of a pair that is nearly 1 must not be rounded before 1 is subtracted.
    dtype, grad = DTYPES[-1], torch.tensor(2.0**14)
    for op, expected, inputs in (
        (
            functools.partial(info_nce_loss, in_batch=False),
            functools.partial(reference.info_nce_loss, in_batch=False),
            queue_inputs((129, 72), 150, dtype, device, scale=100.0),
        ),
        (
            functools.partial(nt_xent_loss, normalize=False),
            functools.partial(reference.nt_xent_loss, normalize=False),
            view_inputs((129, 72), dtype, device, scale=100.0),
        ),
    ):
        ours, truth = value_and_grads(op, inputs, grad), value_and_grads(expected, in_double(inputs), grad)
        for name in {"d_query", "d_key", "d_first", "d_second"} & set(ours):
            size = truth[name].norm(dim=1)
            error = (ours[name].double() - truth[name]).norm(dim=1) / size
            worst = error[size > 1e-3 * size.max()].max()
            assert worst < 1e-2, f"{name}: worst row is off by {worst:.1%}"


@pytest.mark.parametrize("name", ["query", "key", "negatives"])
def test_only_what_is_required_gets_a_gradient(name, device):
    inputs = queue_inputs((20, 16), 30, torch.float32, device)
    expected = value_and_grads(info_nce_loss, inputs, ONE)
    inputs[name] = inputs[name].requires_grad_()
    info_nce_loss(**inputs).backward()
    assert torch.equal(inputs[name].grad, expected[f"d_{name}"])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout, device):
    queue = queue_inputs((67, 40), 70, torch.float32, device)
    views = view_inputs((67, 40), torch.float32, device)
    for op, inputs in ((info_nce_loss, queue), (nt_xent_loss, views)):
        expected = value_and_grads(op, inputs, ONE)
        moved = {name: strided(x, layout) if x.ndim else x for name, x in inputs.items()}
        for name, value in value_and_grads(op, moved, ONE).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "negatives"])
def test_not_finite_features_are_not_hidden(name, bad, device):
    inputs = queue_inputs((20, 16), 30, torch.float32, device)
    inputs[name][3, 5] = bad
    assert not info_nce_loss(**inputs).isfinite()
