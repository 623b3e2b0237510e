"""Neither the losses nor the retrieval ranks ever hold N x N, as the peak memory of a fresh process shows."""

import subprocess
import sys

import pytest

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(INTERPRET or ON_GPU, reason="measures the CPU path")

PEAK = """
import re, torch
{setup}
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) // 1024
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = status("VmRSS")
{call}
print(status("VmHWM") - before)
"""
OTHERS = {
    "info_nce_loss": "info_nce_loss(image, key, 14.3, negatives=text, in_batch=False{}).backward()",
    "nt_xent_loss": "nt_xent_loss(image, text, 14.3{}).backward()",
    "sigmoid_loss": "sigmoid_loss(image, text, 14.3, -10.0{}).backward()",
}
FEATURES = """
from clipfast import {op}
torch.set_num_threads(1)  # threads that wait for each other take minutes where other tests run beside this one
image, key, text = (torch.nn.functional.normalize(torch.randn(8192, 16), dim=-1).requires_grad_() for _ in range(3))
pairs = image, key, text
image, key, text = (x[:9].detach().requires_grad_() for x in pairs)
{call}
image, key, text = pairs
"""
LOSS = """
image, text = (torch.randn(16384, 512) for _ in range(2))
for features in (image, text):
    features.div_(features.norm(dim=-1, keepdim=True)).requires_grad_()
scale = torch.tensor(14.3, requires_grad=True)
small = image[:64].detach().requires_grad_()
loss(small, small, scale).backward()
"""
RANKS = """
from clipfast import retrieval_ranks
torch.set_num_threads(1)  # threads that wait for each other take minutes where other tests run beside this one
image, text = torch.randn({images}, 16), torch.randn({texts}, 16)
owner = torch.randint({images}, ({texts},))
retrieval_ranks(image[:9], text[:9])
"""


def peak_mib(setup: str, call: str) -> int:
    """Return the peak memory of ``call`` in MiB, beyond what ``setup`` has made and loaded."""
    code = PEAK.format(setup=setup, call=call)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_peak_is_an_eighth_of_open_clip():
    pytest.importorskip("open_clip")
    call = "loss(image, text, scale).backward()"
    theirs = peak_mib(f"from open_clip.loss import ClipLoss; loss = ClipLoss(){LOSS}", call)
    ours = peak_mib(f"from clipfast import contrastive_loss as loss{LOSS}", call)
    # N x N in float32 is 1024 MiB: if theirs is less than that, the measurement is wrong.
    assert theirs > 1024
    assert ours <= theirs / 8, f"{ours} MiB against OpenCLIP's {theirs} MiB"


@pytest.mark.parametrize("op", OTHERS)
def test_losses_hold_no_matrix_of_logits(op):
    setup = FEATURES.format(op=op, call=OTHERS[op].format(""))
    # 64 million logits in float32 are 256 MiB: if the reference takes less, the measurement is wrong.
    assert peak_mib(setup, OTHERS[op].format(", backend='torch'")) > 256
    assert peak_mib(setup, OTHERS[op].format("")) < 64  # a chunk of logits is 32 MiB


def test_ranks_of_200000_captions():
    call = "retrieval_ranks(image, text, text_image=owner, backend={!r})"
    # 64 million scores in float32 are 256 MiB: if the reference takes less, the measurement is wrong.
    assert peak_mib(RANKS.format(images=8192, texts=8192), call.format("torch")) > 256
    # The scores would be 30 GiB. Four tiles are 9 MiB, and what is kept of each caption 10 MiB.
    assert peak_mib(RANKS.format(images=40_000, texts=200_000), call.format("auto")) < 40
