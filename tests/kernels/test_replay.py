"""Test that a loss whose kernels are started again by their addresses has the same results, to the last bit.

Triton's interpreter takes the place of the compiled kernels. It gets tensors at the addresses that a kernel would get.
"""

import ctypes
import functools
import weakref

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels import configs, contrastive_loss, info_nce_loss, launch, nt_xent_loss, sigmoid_loss
from clipfast.kernels.compiled import Compiled
from clipfast.kernels.contrastive.launches import small_blocks
from clipfast.kernels.launch import Plan

LOSSES = {
    "contrastive": lambda x, y, z, scale: contrastive_loss(x, y, scale),
    "contrastive normalised": lambda x, y, z, scale: contrastive_loss(x, y, scale, normalize=True),
    "contrastive offset": lambda x, y, z, scale: contrastive_loss(x, torch.cat((z, y)), scale, offset=4),
    "sigmoid": lambda x, y, z, scale: sigmoid_loss(x, y, scale, scale - 9),
    "sigmoid normalised": lambda x, y, z, scale: sigmoid_loss(x, y, scale, scale - 9, normalize=True),
    "info_nce": lambda x, y, z, scale: info_nce_loss(x, y, scale),
    "info_nce queue": lambda x, y, z, scale: info_nce_loss(x, y, scale, negatives=z, in_batch=False),
    "info_nce frozen": lambda x, y, z, scale: info_nce_loss(x, y.detach(), scale, negatives=z.detach(), in_batch=False),
    "info_nce both": lambda x, y, z, scale: info_nce_loss(x, y, scale, negatives=z, normalize=True),
    "nt_xent": lambda x, y, z, scale: nt_xent_loss(x, y, scale),
    "nt_xent not normalised": lambda x, y, z, scale: nt_xent_loss(x, y, scale, normalize=False),
}


@pytest.fixture
def directly_started(monkeypatch):
    """Let plans start interpreted kernels by addresses, as they start compiled ones.

    Return the kernels so started, and the others.
    """
    started, others, interpret = [], [], Plan.start_by_triton

    def by_triton(plan, tensors):
        """Start an interpreted kernel. The interpreter's own calls of PyTorch do not count as those of a loss."""
        with _disable_current_modes():
            interpret(plan, tensors)

    def tensor_at(address, like):
        """Return a tensor at an address, or None, as a kernel gets it in place of ``like``."""
        if like is None or not like.numel():
            return like
        bytes_there = (ctypes.c_char * like.untyped_storage().nbytes()).from_address(address)
        return torch.frombuffer(bytes_there, dtype=like.dtype)

    def start_by_triton(plan, tensors):
        """Start an interpreted kernel, and keep a function that starts it by addresses."""

        def launch_at(_stream, values):
            """Start the interpreted kernel by addresses, and by sizes and strides of descriptors."""
            left, given = iter(values), []
            for like in tensors:
                is_tiled = like.__class__ is TensorDescriptor
                given.append(tensor_at(next(left), like.base if is_tiled else like))
                if is_tiled:
                    numbers = [next(left) for _ in range(4)]
                    given[-1] = TensorDescriptor(
                        given[-1].as_strided(numbers[:2], numbers[2:]), numbers[:2], numbers[2:], like.block_shape
                    )
            started.append(plan)
            by_triton(plan, tuple(given))

        others.append(plan)
        by_triton(plan, tensors)
        makers = [lambda x: [x.base.data_ptr()]] * sum(x.__class__ is TensorDescriptor for x in tensors)
        compiled = Compiled(lambda *_: by_triton(plan, tensors), None, launch_at, makers)
        plan.compiled[launch._bind(tensors)[0]] = compiled
        plan.stream_of, plan._device_of = (lambda _: 0), (lambda: plan.index)

    monkeypatch.setattr(Plan, "start_by_triton", start_by_triton)
    monkeypatch.setattr(Plan, "start_compiled", lambda plan, tensors: False)
    configs.forget_plans()
    yield started, others
    configs.forget_plans()


def results(loss, seed, pairs, width, dtype):
    """Return the value and the gradients of a loss of random features."""
    torch.manual_seed(seed)
    x, y, z = (normalize(torch.randn(rows, width), dim=-1).to(dtype).requires_grad_() for rows in (pairs, pairs, 4))
    scale = torch.tensor(5.0 + seed, requires_grad=True)
    value = loss(x, y, z, scale)
    return value, *torch.autograd.grad(value, (x, y, z, scale), torch.tensor(0.7), allow_unused=True)


# On sm_90, kernels load features of 16 bits by descriptors. Rows of 12 bytes are copied before the recorded pass.
@pytest.mark.parametrize(("arch", "pairs", "width", "dtype"), [(90, 11, 6, torch.float16), (80, 67, 16, torch.float32)])
@pytest.mark.parametrize("name", LOSSES)
def test_kernels_that_are_started_again(name, arch, pairs, width, dtype, interpreted, monkeypatch, request):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    configs.forget_plans()
    call = functools.partial(results, LOSSES[name], pairs=pairs, width=width, dtype=dtype)
    expected = call(2)
    started, others = request.getfixturevalue("directly_started")
    # The first call is not recorded, the second one is, and the third one starts the recorded kernels.
    for seed in range(2):
        call(seed)
    others.clear()
    found = call(2)
    assert len(started) >= 5
    assert not others
    for value, other in zip(found, expected, strict=True):
        assert (value is None) == (other is None)
        assert value is None or torch.equal(value, other)


def test_a_loss_of_several_blocks_is_not_recorded_and_frees_each_block(interpreted, monkeypatch):
    given, counts, start = [], [], Plan.start

    def counted(plan, *tensors):
        """Start a kernel, and count the tensors that kernels of the loss were given and that are not freed yet."""
        given.extend(map(weakref.ref, filter(torch.is_tensor, tensors)))
        counts.append(len({id(ref()) for ref in given if ref() is not None}))
        start(plan, *tensors)

    monkeypatch.setattr(Plan, "start", counted)
    x, y = torch.randn(67, 8), torch.randn(67, 8)
    with small_blocks(16):
        configs.forget_plans()
        for _ in range(2):  # the second call tries to record
            contrastive_loss(x, y, torch.tensor(5.0))
    configs.forget_plans()
    first, second = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    assert len(first) > 20
    assert max(second) == max(first)
