"""The Gluon kernels that are off by default under ttsem: values, phases of barriers, and waiting for other programs."""

import contextlib
import copy
import random
import threading
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels.experimental import resident_walks
from clipfast.kernels.experimental.backward import backward_kernel
from clipfast.kernels.experimental.launches import (
    backward_arguments,
    backward_constants,
    stats_arguments,
    stats_constants,
)

from .conftest import needs_sanitizer, sanitizer_session

pytestmark = needs_sanitizer
SCALE = 20.0


def features(m, n, d, offset):
    """Features, their products, and powers without the pairs; of the rows with a pair, the numbers."""
    x, y = (F.normalize(torch.randn(size, d), dim=1).bfloat16() for size in (m, n))
    cosines = x.double() @ y.double().T
    p = torch.exp(SCALE * cosines)
    rows = torch.arange(max(0, -offset), min(m, n - offset))
    p[rows, rows + offset] = 0
    return x, y, cosines, p, rows


def error(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def unset(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan")).to(dtype)


errors: list[BaseException] = []
turn = threading.Lock()  # ttsem is not made for threads: a program hands over where it exchanges something with others


def all_at_once(interp, name, args):
    """Run the programs of a grid in turns, as if at once."""
    errors.clear()  # another program may wait for one that failed, and looks here

    def run(number):
        mine = copy.copy(interp)
        mine._tls, mine.mbarriers = threading.local(), {}
        with turn:
            try:
                mine.run(name, args, (number, 0, 0))
            except BaseException as wrong:
                errors.append(wrong)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(interp.num_programs[0])]
    random.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def gluon_session():
    """ttsem, taught to compile Gluon, to write back what descriptors describe, and to run programs in threads."""
    with sanitizer_session(), contextlib.ExitStack() as patches:
        from triton.experimental import gluon
        from ttsem import harness, interp, memory, mlir, sanitize

        def ir_of(record, stage, target, *rest, **more):
            mlir.enable_generic_printing()
            return mlir.to_generic(harness._stage_text(record, "ttgir", target), None)

        is_tensor, write_back, atomic = harness._is_tensor_like, sanitize._write_back, memory.Memory.atomic

        def written_back(record, execution):
            with mock.patch.object(harness, "_is_tensor_like", lambda x: is_tensor(x) or hasattr(x, "block_shape")):
                write_back(record, execution)

        def in_turn(*args, **kwargs):
            if errors:
                raise RuntimeError("another program failed")
            if turn.locked():
                turn.release()
                time.sleep(1e-3)
                turn.acquire()
            return atomic(*args, **kwargs)

        @gluon.jit
        def fence():  # what it orders is in order here, and ttsem knows no PTX
            pass

        for module, name, value in (
            (harness, "ir_for_launch", ir_of), (sanitize, "_write_back", written_back),
            (memory.Memory, "atomic", in_turn), (interp.Interp, "run_grid", all_at_once),
            (resident_walks, "fence", fence),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(module, name, value))
        yield


@pytest.mark.parametrize(("m", "n", "d", "offset"), [(512, 256, 256, 0), (480, 200, 512, 40), (300, 400, 256, -72)])
def test_statistics(m, n, d, offset):
    x, y, _, p, _ = features(m, n, d, offset)
    args = stats_arguments(x, y, torch.tensor([SCALE]), offset, unset)
    with gluon_session():
        resident_walks.stats_kernel[(-(-n // 128),)](**args, **stats_constants(d), num_warps=8)
    torch.testing.assert_close(args["row_sum_ptr"].double().sum(0), p.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(args["col_sum_ptr"].double().sum(0), p.sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("m", "n", "d", "offset", "block", "programs"),
    [
        (512, 256, 256, 0, (256, 128), 1), (480, 200, 512, 40, (256, 128), 1),
        (512, 512, 256, 0, (256, 256), 2), (1000, 1000, 256, -30, (512, 512), 8),
    ],
)  # fmt: skip
def test_backward(m, n, d, offset, block, programs):
    x, y, cosines, p, rows = features(m, n, d, offset)
    u, v, one_minus_p = 1 / p.sum(1), 1 / p.sum(0), torch.rand(m)
    args = backward_arguments(x, y, offset, unset, block, programs) | {
        "scale_ptr": torch.tensor([SCALE]), "factor_ptr": torch.tensor([0.5]), "one_minus_p_ptr": one_minus_p,
        "row_weight_ptr": u.float(), "col_weight_ptr": v.float(), "counters": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    with gluon_session():
        backward_kernel[(programs,)](**args, **backward_constants(d), num_warps=8)
    G = p * (u[:, None] + v[None, :])
    x_grad = G @ y.double()
    x_grad[rows] -= one_minus_p[rows, None] * y[rows + offset].double()
    assert error(args["grad_x_ptr"], 0.5 * x_grad) < 2**-7
    assert error(args["acc_y"].base, G.T @ x.double()) < 2**-7
    torch.testing.assert_close(args["dot_ptr"].double().sum(), (G * cosines).sum(), rtol=1e-6, atol=0)
    assert args["counters"].tolist() == [programs * args["num_rows"] * args["num_cols"]] * 2
