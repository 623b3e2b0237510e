"""The specification of the activations with a bias: sizes, inputs, cases, floors, and the calls that are compiled
offline.
"""

import dataclasses

import torch

from .. import reference
from ..configs import RowConfig
from ..spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, RowShape, Shipped, Target, Tunable, on
from .op import bias_gelu, bias_quick_gelu


def make(shape: RowShape, values: str, draw: Draw) -> Call:
    """Make the input rows, the bias and the upstream gradient of a case; ``values`` says how large they are."""
    size = shape.rows, shape.width
    scale = {"large": 1e3, "tiny": 1e-4}.get(values, 1.0)
    x = 2 * scale * draw.normal(*size)
    if values == "range":
        x = torch.linspace(-60, 60, shape.elements, device=draw.device).view(size)
    bias = draw.normal(shape.width) * (scale if values == "tiny" else 1.0)
    return Call({"x": x, "bias": bias}, (draw.normal(*size),))


def floor(shape: RowShape, itemsize: int, backward: bool) -> Floor:
    """Count the operations and bytes of bias and activation, with the bias in float32.

    The forward pass reads x and writes the result. The backward pass reads x and the upstream gradient, and writes the
    gradients of x and of the bias.
    """
    tensors, parameters = (3, 2) if backward else (2, 1)
    return Floor(20 * shape.elements, tensors * shape.elements * itemsize + parameters * shape.width * 4)


FEW = 6  # draws that are judged as one, since a narrow bias has few gradients whose errors can be compared
CASES = [
    Case(RowShape(37, 3), "three columns", draws=FEW, sanitize=True),
    Case(RowShape(67, 77), "odd rows and an odd width", quick=True, sanitize=True),
    Case(RowShape(50, 3072), "B/32's MLP, an image", NOT_INTERPRETED),
    Case(RowShape(3, 5120), "H/14's MLP"),
    Case(RowShape(2, 8200), "wider than bigG/14's MLP, and no multiple of a tile"),
    Case(RowShape(37, 1), "one column", draws=FEW),
    Case(RowShape(37, 1024), "whole tiles of columns"),
    Case(RowShape(1, 24), "one row"),
    Case(RowShape(1033, 24), "many tiles of rows, the last one short"),
    Case(RowShape(0, 64), "no rows"),
    Case(RowShape(3, 0), "no columns"),
    Case(RowShape(257, 4096), "L/14's MLP, an image", NOT_INTERPRETED),
    Case(RowShape(65792, 4096), "L/14's MLP, a batch", on(CUDA)),
    *Case.layouts(RowShape(67, 40), expanded=RowShape(37, 72)),
    Case.extreme(RowShape(67, 40), "range", "from -60 to 60: both tails, and all between", quick=True),
    Case.extreme(RowShape(33, 72), "large", "values of thousands: a product of two overflows in 16 bits"),
    Case.extreme(RowShape(33, 72), "tiny", "next to zero, where the slope is a half"),
    *Case.repeats(RowShape(517, 96), RowShape(65792, 4096)),
]
# The number of tokens and the width of the MLP in the towers L/14, B/16, H/14 and bigG/14.
TOWERS = ((257, 4096), (197, 3072), (257, 5120), (257, 8192))
IMAGES = {"cpu": 4, "cuda": 256}
TILES = {"block_m": (2, 4, 8, 16), "block_n": (128, 256, 512, 1024), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)}
GELU = OpSpec(
    op=bias_gelu,
    reference=reference.bias_gelu,
    make=make,
    cases=CASES,
    small=(RowShape(10, 12),),
    category="norm, activation",
    torch_op="bias_act",
    kernels=("_bias_act_fwd_kernel", "_bias_act_bwd_kernel"),
    floor=floor,
    bench={
        device: tuple(RowShape(images * tokens, width) for tokens, width in TOWERS) for device, images in IMAGES.items()
    },
    items=("rows", "rows"),
    float32=("bias",),
    follows_autocast=False,
    # These are the widths of the MLPs of L/14 and H/14.
    shipped=(Shipped("N4096", RowShape(64, 4096), ("bf16", "fp32")), Shipped("N5120", RowShape(64, 5120))),
    # Both activation ops share these kernels. They are tuned for 256 images of L/14.
    targets=(
        Target("bias_act", RowShape(65792, 4096), Tunable.named(RowConfig, "bias_act_bwd", "bias_act_fwd", axes=TILES)),
    ),
)
QUICK_GELU = dataclasses.replace(
    GELU,
    op=bias_quick_gelu,
    reference=reference.bias_quick_gelu,
    shipped=(Shipped("N4096", RowShape(64, 4096)),),
    targets=(),
)
SPECS = (GELU, QUICK_GELU)
