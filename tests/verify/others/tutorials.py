"""Checks of Triton's tutorial kernels; the environment variable TRITON_TUTORIALS names the folder python/tutorials.

The tutorials run tests and benchmarks when they are imported, so only the part before these is imported, from a copy.
"""

import functools
import importlib.util
import os
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from norms import norm_check  # the folder of a check is searched for modules

from clipfast.kernels.spec import Floor
from clipfast.verify import KernelCheck

END = r"^(torch\.manual_seed|def test_|@pytest|@triton\.testing)"


@functools.cache
def tutorial(number):
    """Import the part of a tutorial that defines its kernels."""
    (path,) = Path(os.environ["TRITON_TUTORIALS"]).glob(f"{number}-*.py")
    source = re.split(END, path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    copy = Path(tempfile.mkdtemp(prefix="tutorial-")) / f"tutorial_{number}.py"
    copy.write_text(source)
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOFTMAX = KernelCheck(
    function=lambda x: tutorial("02").softmax(x),
    reference=lambda x: torch.softmax(x, -1),
    inputs=lambda draw, rows, width: {"x": draw.normal(rows, width)},
    shapes=[{"rows": 5, "width": 100}, {"rows": 3, "width": 256}],
    real={"rows": 4096, "width": 1024},
    floor=lambda itemsize, rows, width: Floor(0, itemsize * 2 * rows * width),
)

MATMUL = KernelCheck(
    function=lambda a, b: tutorial("03").matmul(a, b),
    reference=lambda a, b: a @ b,
    inputs=lambda draw, m, n, k: {"a": draw.normal(m, k), "b": draw.normal(k, n)},
    shapes=[{"m": 100, "n": 60, "k": 90}, {"m": 64, "n": 256, "k": 64}],
    real={"m": 4096, "n": 4096, "k": 1024},
    dtypes=("fp16", "bf16"),
    floor=lambda itemsize, m, n, k: Floor(2 * m * n * k, itemsize * (m * k + k * n + m * n)),
)

LAYER_NORM = norm_check(
    lambda x, weight, bias: tutorial("05").LayerNorm.apply(x, x.shape[-1:], weight, bias, 1e-5), rows=300
)


def attention(q, k, v):
    """Return causal attention by the tutorial's kernel."""
    return tutorial("06").attention(q, k, v, True, q.shape[-1] ** -0.5, False)


ATTENTION = KernelCheck(
    function=attention,
    reference=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    inputs=lambda draw, heads, length, width: {name: draw.normal(1, heads, length, width) for name in "qkv"},
    shapes=[{"heads": 1, "length": 128, "width": 64}, {"heads": 2, "length": 256, "width": 64}],
    real={"heads": 48, "length": 4096, "width": 64},
    dtypes=("fp16", "bf16"),
    floor=lambda itemsize, heads, length, width: Floor(
        7 * heads * length**2 * width, itemsize * 8 * heads * length * width
    ),
)
