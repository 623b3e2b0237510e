"""The specification of layer norm: sizes, inputs, cases, floors, and the calls that are compiled offline."""

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor

from .. import reference
from ..configs import WIDTHS, RowConfig
from ..spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, RowShape, Shipped, Target, Tunable, on
from .op import layer_norm


@dataclasses.dataclass(frozen=True)
class NormShape(RowShape):
    """Rows [rows, width], with or without a residual that is added before the norm."""

    residual: bool = False


def make(shape: NormShape, values: str, draw: Draw) -> Call:
    """Make the inputs of a layer norm: rows, parameters, and an upstream gradient for each result."""
    inputs = {"x": rows_of(shape, values, draw), "weight": draw.normal(shape.width), "bias": draw.normal(shape.width)}
    if shape.residual:
        inputs["residual"] = rows_of(shape, values, draw)
    return Call(inputs, gradients(shape, values, draw, 1 + shape.residual))


def rows_of(shape: RowShape, values: str, draw: Draw) -> Tensor:
    """Make rows for a layer norm: with a mean that is not zero, or of the kind that ``values`` names."""
    x = draw.normal(shape.rows, shape.width) + 0.5
    if values == "zeros":
        x.zero_()
    elif values == "constant rows":
        # Sums of small whole numbers are exact, so the variance is exactly zero.
        x = draw.integers(-8, 9, shape.rows, 1).float().repeat(1, shape.width)
    elif values == "large mean":
        x += 3000
    elif values == "outlier":
        x[:, shape.width // 3] += 300
    elif values == "large":
        x *= 1e3
    elif values == "tiny":
        x *= 1e-4
    return x


def gradients(shape: RowShape, values: str, draw: Draw, results: int) -> tuple[Tensor, ...]:
    """Make an upstream gradient for each result; for rows of zeros its elements are 1 or -1, whose sums are exact."""
    grads = tuple(draw.normal(shape.rows, shape.width) for _ in range(results))
    return tuple(grad.sign() for grad in grads) if values == "zeros" else grads


def floor(shape: NormShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of a layer norm, with parameters, means and rstds in float32.

    Forward reads x and the residual, and writes the norm and the sum. Backward reads the sum, the gradient of each
    result and the weight; it writes one gradient for both x and the residual, and the gradients of both parameters.
    """
    tensors = (4 if shape.residual else 3) if backward else (4 if shape.residual else 2)
    parameters = (3 if backward else 2) * shape.width * 4
    flops = (13 if backward else 8) * shape.elements
    return Floor(flops, tensors * shape.elements * itemsize + parameters + 8 * shape.rows)


FEW = 6  # draws that are judged as one, since narrow rows have few sums whose errors can be compared


def cases(sized: Callable[[int, int], RowShape]) -> list[Case]:
    """Return the cases of one kind of layer norm; ``sized`` makes its shape from rows and width."""
    return [
        Case(sized(37, 3), "three numbers a row", draws=FEW),
        Case(sized(67, 77), "odd rows and an odd width", quick=True, sanitize=True),
        Case(sized(17, 768), "B/32's width"),
        Case(sized(9, 1000), "no power of two, and no multiple of a warp's columns"),
        Case(sized(7, 1024), "L/14's width: no column is masked"),
        Case(sized(5, 1025), "one past L/14's width", sanitize=True),
        Case(sized(5, 1664), "bigG/14's width"),
        Case(sized(3, 4096), "wide"),
        Case(sized(2, 8192), "the widest"),
        Case(sized(37, 1), "rows of one zero, which is its own mean", values="zeros"),
        Case(sized(37, 64), "no column is masked; several rows share a tile"),
        Case(sized(1, 24), "one row", sanitize=True),
        Case(sized(4099, 24), "many tiles for each program, the last one short"),
        Case(sized(0, 64), "no rows"),
        Case(sized(1028, 1024), "L/14, four images", NOT_INTERPRETED),
        Case(sized(65792, 1024), "L/14, a batch", on(CUDA)),
        Case(sized(65792, 1664), "bigG/14, a batch", on(CUDA)),
        *Case.layouts(sized(67, 40), expanded=sized(37, 72)),
        Case.extreme(sized(33, 64), "constant rows", "no variance: eps alone keeps the scale finite", quick=True, draws=FEW),
        Case.extreme(sized(9, 768), "large mean", "a mean of 3000: E[x^2] - E[x]^2 would have nothing left", quick=True),
        Case.extreme(sized(9, 768), "outlier", "one channel of hundreds, as in towers", draws=FEW),
        Case.extreme(sized(33, 72), "large", "values of thousands"),
        Case.extreme(sized(33, 72), "tiny", "a variance far below eps"),
        *Case.repeats(sized(517, 96), sized(65792, 1024)),
    ]  # fmt: skip


after_residual = functools.partial(NormShape, residual=True)

# The number of tokens and the width of the image towers L/14, B/16, H/14 and bigG/14.
TOWERS = ((257, 1024), (197, 768), (257, 1280), (257, 1664))
IMAGES = {"cpu": 4, "cuda": 256}


def towers(device_type: str, sized: Callable[[int, int], RowShape]) -> tuple[RowShape, ...]:
    """Return the shape of one layer norm of each image tower, for benchmarks."""
    return tuple(sized(IMAGES[device_type] * tokens, width) for tokens, width in TOWERS)


def target(op: str, shape: RowShape) -> Target:
    """Return the tuning target of a layer norm's two kernels at a shape.

    A tile holds one, two or four rows of the largest width that the table entry serves.
    """
    widest = min(limit for limit in WIDTHS if shape.width <= limit)
    axes = {"block_m": (1, 2, 4), "block_n": (widest,), "num_warps": (2, 4, 8, 16), "num_stages": (1, 2, 3)}
    kernels = Tunable.named(RowConfig, f"{op}_bwd", f"{op}_fwd", axes=axes, per_width=True)
    return Target(f"{op}-{widest}", shape, kernels)


# 256 images of L/14 and of bigG/14; the other two widths occur in no published model.
TUNED_SHAPES = (65792, 1024), (65792, 1664), (16384, 4096), (8192, 8192)

SPECS = (
    OpSpec(
        op=layer_norm,
        reference=reference.layer_norm,
        make=make,
        cases=[*cases(NormShape), *cases(after_residual)],
        small=(NormShape(10, 12), after_residual(10, 12)),
        category="norm, activation",
        kernels=("_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"),
        floor=floor,
        bench={device: (*towers(device, after_residual), *towers(device, NormShape)) for device in IMAGES},
        items=("rows", "rows"),
        float32=("weight", "bias"),
        follows_autocast=False,
        # The widths of B, L, H and bigG; the largest width; and a 16-bit x that is added to a float32 residual stream,
        # as under autocast.
        shipped=(
            *(Shipped(f"residual N{width}", after_residual(64, width)) for width in (768, 1280, 1664, 4096)),
            *(Shipped(f"residual N{width}", after_residual(64, width), ("bf16", "fp32")) for width in (1024, 8192)),
            Shipped("residual N1024 bf16 into", after_residual(64, 1024), ("fp32",), casts={"x": "bf16"}),
        ),
        targets=tuple(target("layer_norm", after_residual(*size)) for size in TUNED_SHAPES),
    ),
)
