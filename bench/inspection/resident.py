"""The predicted time of the contrastive loss on an H100 with the kernels of kernels/experimental, part by part:

    python -m clipfast.bench.inspection.resident [--pairs 32768]

in bfloat16 with D = 512, blocks of G of 4,096 x 8,192 and the launches and PyTorch ops that would stay as they are. The
model knows no program that waits for another, so the waits of the one launch of the backward pass are not in it: that
they are short is a claim, and ``slack`` is what the limit of power leaves for each of them.
"""

import argparse
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels.contrastive.triton_blocks import small_blocks
from clipfast.kernels.experimental.launches import (
    BLOCK,
    PROGRAMS,
    backward_arguments,
    backward_constants,
    stats_arguments,
    stats_constants,
)
from clipfast.kernels.spec import specs

from . import offline
from .forecast import predict_parts
from .model import ARCH, H100, QUICK, Effort, Prediction, load, predict
from .workloads import op_work

WIDTH = 512
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32"}
# A path with so many turns of a loop is run as it is.
WHOLE = Effort(steps=150_000, turns=10_000, programs=12, kinds=2)


def compiled(kernel: Any, args: dict[str, Any], constants: dict[str, Any]) -> Any:
    """Compile a Gluon kernel for these arguments."""
    signature, attrs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value: Any = args.get(name)
        if name in constants or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants = constants | {name: constants.get(name, value)}
        elif isinstance(value, GluonDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, Tensor):
            signature[name], attrs[(index,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options={"num_warps": 8})


def predicted(
    kernel: Any, args: dict[str, Any], constants: dict[str, Any], programs: int, moved: float, effort: Effort
) -> Prediction:
    """Predict a launch of a Gluon kernel that moves so many bytes from and to HBM, and print what it takes."""
    code = compiled(kernel, args, constants)
    found = offline.resources(code, copies=False)
    print(
        f"{code.metadata.name}: {found.registers} registers, {found.spill_bytes} bytes spilled, "
        f"{found.shared_bytes} bytes of shared memory, warnings: {', '.join(found.warnings) or 'none'}"
    )
    plain = {name: _plain(value) for name, value in args.items()}
    return predict(load(code), (programs,), plain, H100, hbm_bytes=moved, effort=effort)


def _plain(value: Any) -> Any:
    if isinstance(value, GluonDescriptor):
        return TensorDescriptor(value.base, value.shape, value.strides, value.block_shape)
    return value


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def statistics(pairs: int) -> Prediction:
    """Predict the statistics of all logits, in one launch."""
    from clipfast.kernels.experimental.resident_walks import stats_kernel

    x = _empty(pairs, WIDTH, dtype=torch.bfloat16)
    args = stats_arguments(x, x, _empty(1), 0, _empty)
    moved = 2 * x.nbytes + args["row_sum_ptr"].nbytes + args["col_sum_ptr"].nbytes
    return predicted(stats_kernel, args, stats_constants(WIDTH), args["segments"] * pairs // 128, moved, QUICK)


def row_of_blocks(pairs: int) -> Prediction:
    """Predict the backward pass of the first rows of features, as many as a block of G has."""
    from clipfast.kernels.experimental.backward import backward_kernel

    rows, cols = BLOCK
    x, y = (_empty(size, WIDTH, dtype=torch.bfloat16) for size in (rows, pairs))
    args = backward_arguments(x, y, 0, _empty)
    blocks = pairs // cols
    # G is written once and read twice; features are read for G and for its products, accumulators added to
    moved = blocks * (3 * 2 * rows * cols + 2 * 2 * (rows + cols) * WIDTH + 2 * 4 * (rows + cols) * WIDTH)
    return predicted(backward_kernel, args, backward_constants(WIDTH), PROGRAMS, moved, WHOLE)


def others(pairs: int) -> dict[str, float]:
    """Return the seconds of the launches and ops that would stay, by name."""
    spec = specs()["contrastive_loss"]
    with small_blocks(pairs):
        work = op_work(spec, spec.bench["cuda"][0].changed(pairs=pairs, embed_dim=WIDTH), "bf16")
    dropped = ("_stats_kernel", "_grad_tile_kernel", "_products_kernel", "_finish_kernel")
    launches = [launch for _, launch in work.launches if launch.kernel.__name__ not in dropped]
    found: dict[str, float] = {}
    for part in predict_parts([*launches, work.launches[-1][1]], H100, QUICK):  # the last one finishes y's gradient
        found[part.kernel] = found.get(part.kernel, 0.0) + part.seconds
    # No accumulator is zeroed. The counters are, and what the pairs of x give to the scale's gradient is one op more.
    ops = [op for op in work.ops if op.bytes < 2**20]
    found[f"{len(ops) + 2} PyTorch ops"] = sum(op.bytes / H100.hbm_rate + H100.launch for op in ops) + 2 * H100.launch
    return found


def main() -> int:
    """Print the parts and their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32768, help="a multiple of 8,192")
    pairs = parser.parse_args().pairs
    rows, cols = BLOCK
    forward, row = statistics(pairs), row_of_blocks(pairs)
    strips = pairs // rows
    parts = {"statistics": forward.seconds, "backward": strips * (row.seconds - H100.launch) + H100.launch}
    parts |= others(pairs)
    for name, seconds in parts.items():
        print(f"{name:24} {1e3 * seconds:8.4f} ms")
    print(f"{'sum':24} {1e3 * sum(parts.values()):8.4f} ms")
    for name, one in (("statistics", forward), ("a row of blocks", row)):
        busiest = sorted(one.busy.items(), key=lambda item: -item[1])[:4]
        units = ", ".join(f"{unit} {used:,.0f}" for unit, used in busiest)
        print(f"{name}: {one.cycles:,.0f} cycles a program; {units}; limit {one.limit}")
    left = row.flops / H100.power_flops - row.cycles / H100.clock
    print(f"slack: {1e6 * left / (pairs // cols):.2f} us a block of G, in which its programs wait for each other twice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
