"""Checks of Liger's kernels: ``pip install --no-deps liger-kernel``, then ``clipfast verify liger.py:LAYER_NORM``."""

import torch.nn.functional as F
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from norms import norm_check  # the folder of a check is searched for modules

from clipfast.kernels.spec import Floor
from clipfast.verify import KernelCheck

LAYER_NORM = norm_check(lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5))

GELU = KernelCheck(
    function=lambda a, b: LigerGELUMulFunction.apply(a, b),
    reference=lambda a, b: F.gelu(a, approximate="tanh") * b,
    inputs=lambda draw, rows, width: {"a": draw.normal(rows, width), "b": draw.normal(rows, width)},
    shapes=[{"rows": 5, "width": 100}, {"rows": 3, "width": 256}],
    real={"rows": 16384, "width": 3072},
    floor=lambda itemsize, rows, width: Floor(0, itemsize * 8 * rows * width),
)
