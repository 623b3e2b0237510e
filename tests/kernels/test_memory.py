"""Test by the peak memory of a new process that neither losses nor retrieval ranks hold an N x N matrix."""

import subprocess
import sys

import pytest

# A program that prints, for each of some calls of ops, the MiB by which the peak memory exceeds the memory before the
# call. Its ``setup`` makes the inputs and loads all libraries, so that neither counts.
PEAKS = """
import re, torch
from torch.nn.functional import normalize
from clipfast import *
torch.set_num_threads(1)  # threads that wait for each other take minutes where other tests run beside this one
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) // 1024
{setup}
for call in {calls}:
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    exec(call)
    print(status("VmHWM") - before)
"""
FEATURES = """
first, second, third = (normalize(torch.randn({pairs}, 16), dim=-1).requires_grad_() for _ in range(3))
def run(loss, rows={pairs}):
    loss(*(x[:rows] for x in (first, second, third))).backward()
run({loss}, 1100)  # load what a call loads; the losses of fewer pairs may go another way
"""
RANKS = """
image, text, owner = torch.randn(2048, 16), torch.randn(100_000, 16), torch.randint(2048, (100_000,))
retrieval_ranks(image[:9], text[:9])
"""


def peaks_mib(setup: str, *calls: str) -> list[int]:
    """Return the peak memory in MiB that each of some calls of ops needs beyond the memory before."""
    code = PEAKS.format(setup=setup, calls=calls)
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [int(line) for line in lines.split()]


def loss_peaks(pairs: int, *losses: str, imports: str = "") -> list[int]:
    """Return the peak memory of loss ops, each a function of three sets of features, forward and backward."""
    setup = imports + FEATURES.format(pairs=pairs, loss=losses[0])
    return peaks_mib(setup, *(f"run({loss})" for loss in losses))


def test_peak_is_an_eighth_of_open_clip():
    pytest.importorskip("open_clip")
    names = "contrastive_loss", "ClipLoss()"
    calls = (f"lambda x, y, _: {name}(x, y, torch.tensor(14.3, requires_grad=True))" for name in names)
    ours, theirs = loss_peaks(6144, *calls, imports="from open_clip.loss import ClipLoss")
    # The N x N logits in float32 are 144 MiB: if PyTorch's peak is less than that, the measurement is wrong.
    assert theirs > 144
    assert ours <= theirs / 8, f"{ours} MiB against OpenCLIP's {theirs} MiB"


def test_losses_hold_no_matrix_of_logits():
    calls = (
        "info_nce_loss(x, y, 14.3, negatives=z, in_batch=False, backend={!r})",
        "nt_xent_loss(x[:2048], y[:2048], 14.3, backend={!r})",
        "sigmoid_loss(x, y, 14.3, -10.0, backend={!r})",
    )
    peaks = loss_peaks(4096, *(f"lambda x, y, z: {call.format(name)}" for call in calls for name in ("auto", "torch")))
    # 16 million logits in float32 are 64 MiB: if the reference takes less, the measurement is wrong.
    assert min(peaks[1::2]) > 64
    assert max(peaks[::2]) < 32  # a block of logits is 8 MiB


def test_a_first_call_loads_no_compiler():
    # PyTorch's dispatcher imports torch._dynamo, 67 MiB, at the first call of an op that is registered in Python.
    code = (
        "import sys, torch; from clipfast.kernels import contrastive_loss\n"
        "x = torch.randn(1100, 16).requires_grad_(); contrastive_loss(x, x, 1.0, normalize=True).backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert lines.strip() == "False"


def test_ranks_of_100000_captions():
    some = "retrieval_ranks(image, text[:16384], text_image=owner[:16384], backend='torch')"
    ours, reference = peaks_mib(RANKS, "retrieval_ranks(image, text, text_image=owner)", some)
    # 32 million scores in float32 are 128 MiB: if the reference takes less, the measurement is wrong.
    assert reference > 128
    # All scores would take 780 MiB. Four tiles take 9 MiB, and the vectors with a number for each caption 5 MiB.
    assert ours < 40
