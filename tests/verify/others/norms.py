"""A check of layer norm kernels, which the checks of several projects share."""

import torch.nn.functional as F

from clipfast.kernels.spec import Floor
from clipfast.verify import KernelCheck


def norm_check(function, rows=37):
    """Return the check of a layer norm ``function(x, weight, bias)``; ``rows`` is the number of rows in one shape."""
    return KernelCheck(
        function=function,
        reference=lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5),
        inputs=lambda draw, rows, width: {
            "x": draw.normal(rows, width) + 0.5, "weight": draw.normal(width), "bias": draw.normal(width)
        },
        shapes=[{"rows": 5, "width": 100}, {"rows": rows, "width": 64}],
        real={"rows": 16384, "width": 768},
        floor=lambda itemsize, rows, width: Floor(0, itemsize * 5 * rows * width),
    )  # fmt: skip
