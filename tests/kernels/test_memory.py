"""The loss never holds N x N, shown by the peak of a fresh process."""

import subprocess
import sys

import pytest

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(INTERPRET or ON_GPU, reason="measures the CPU path")

PEAK = """
import resource, sys, torch, torch.nn.functional as F
{setup}
image, text = (F.normalize(torch.randn(16384, 512), dim=-1).requires_grad_() for _ in range(2))
scale = torch.tensor(14.3, requires_grad=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = image[:64].detach().requires_grad_()
loss(small, small, scale).backward()
before = peak()
loss(image, text, scale).backward()
print((peak() - before) // 1024)
"""


def peak_mib(setup: str) -> int:
    """Peak memory of forward and backward at N = 16,384, beyond inputs and libraries, in MiB."""
    run = subprocess.run([sys.executable, "-c", PEAK.format(setup=setup)], capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_peak_is_an_eighth_of_open_clip():
    pytest.importorskip("open_clip")
    theirs = peak_mib("from open_clip.loss import ClipLoss; loss = ClipLoss()")
    ours = peak_mib("from clipfast import contrastive_loss as loss")
    # N x N in float32 is 1024 MiB: if theirs is less than that, the measurement is wrong.
    assert theirs > 1024
    assert ours <= theirs / 8, f"{ours} MiB against OpenCLIP's {theirs} MiB"
