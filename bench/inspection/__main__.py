"""Tables of predicted times in Markdown, in bfloat16 on an H100, forward and backward, with all PyTorch ops.

    python -m clipfast.bench.inspection --quick                           the loss of 1,024 to 131,072 pairs
    python -m clipfast.bench.inspection --quick --pairs 4096 --widths 512 768
    python -m clipfast.bench.inspection --quick --pairs 32768 --widths 512 --parts    each kernel of such a loss
    python -m clipfast.bench.inspection --quick --host                    every op and two steps, beside their host

A cell of the table of a loss has the GPU's time by the model, this time corrected (:mod:`.correction`), and the ratio
of the model's time to the floor. The floor is the time of the products at the rate that the power limit allows, or of
moving the bytes of features and gradients, whichever is longer. A ratio that is much larger than its neighbours' marks
a cliff, a size at which the loss is slow. If the host takes longer than the GPU, the host's time follows, which is the
time of an eager call.
"""

import functools
import itertools
import sys
from collections.abc import Sequence

from clipfast.cli.arguments import Count, Parser
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import specs

from . import offline
from .eager import STEP, measured
from .forecast import HOST, Forecast, forecast, forecast_shape, measured_shapes, rows
from .model import FULL, H100, QUICK, Effort

MODELS = ("ViT-B-32", "ViT-L-14")  # models whose training steps stand in the table of GPU and host times


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of predicted times that the command line asks for, row by row."""
    parser = Parser(description=__doc__)
    pairs, widths = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072), (512, 640, 768, 1024, 1280)
    add = parser.add_argument
    add("--host", action="store_true", help="print the table of the host")
    add("--op", default="contrastive_loss", choices=("contrastive_loss", "sigmoid_loss"))
    add("--pairs", type=int, nargs="+", default=pairs, metavar="N", help="numbers of pairs")
    add("--widths", type=int, nargs="+", default=widths, metavar="D", help="widths of the features")
    add("--parts", action="store_true", help="print the kernels of each loss in place of the table")
    add("--quick", action="store_true", help="run less of each kernel: within 2%% of the whole for most")
    add("--jobs", type=Count(1, 1024), metavar="N", help="number of processes for --host (default: one for each core)")
    args = parser.parse_args(arguments)
    effort = QUICK if args.quick else FULL
    if args.host:
        _print_host(effort, args.jobs)
    elif args.parts:
        for shape in itertools.product(args.pairs, args.widths):
            print(rows(_forecast(args.op, *shape, effort)), flush=True)
    else:
        _print_loss(args.op, args.pairs, args.widths, effort)
    return 0


def _forecast(op: str, pairs: int, width: int, effort: Effort) -> Forecast:
    """Predict the time of a loss in bfloat16, forward and backward."""
    spec = specs()[op]
    return forecast_shape(spec, spec.bench["cuda"][0].changed(pairs=pairs, embed_dim=width), "bf16", effort=effort)


def _print_loss(op: str, pairs: Sequence[int], widths: Sequence[int], effort: Effort) -> None:
    """Print the table of a loss: predicted and corrected time, the factor over the floor, and a longer host time."""
    spec = specs()[op]
    print(f"| pairs | {' | '.join(f'D = {width}' for width in widths)} |")
    print("|" + " --- |" * (1 + len(widths)))
    for number in pairs:
        cells = []
        for width in widths:
            found = _forecast(op, number, width, effort)
            shape = spec.bench["cuda"][0].changed(pairs=number, embed_dim=width)
            floors = [spec.floor(shape, DTYPES["bf16"].itemsize, backward) for backward in (False, True)]
            least = sum(floor.seconds(H100.power_flops, H100.hbm_rate) for floor in floors)
            eager = f", host {_milliseconds(found.host_seconds)}" if found.binds == HOST else ""
            times = f"{1e3 * found.seconds:.3g} / {_milliseconds(found.corrected.seconds)}"
            cells.append(f"{times}, {found.seconds / least:.2f}x{eager}")
        print(f"| {number:,} | {' | '.join(cells)} |", flush=True)


def _print_host(effort: Effort, jobs: int | None) -> None:
    """Print the table of steps and of every op at its first size: GPU time, host time, and which of them is longer."""
    shapes = [(spec.name, number) for number, (spec, _) in enumerate(measured_shapes())]
    firsts = [next(same)[1] for _, same in itertools.groupby(shapes, key=lambda one: one[0])]
    print("| call | GPU | host | binds | the GPU binds from |\n|" + " --- |" * 5)
    find = functools.partial(forecast, dtype="bf16", effort=effort, finds_batch=True)
    for one in offline.spread(find, [*MODELS, *firsts], jobs):
        noun = "pairs" if one.name == STEP else specs()[one.name].items[1]
        call = " ".join([one.name, *(f"{name}={value}" for name, value in one.shape.items())])
        times = f"{_milliseconds(one.corrected.seconds)} | {_milliseconds(one.host_seconds)} | {one.binds}"
        print(f"| {call} | {times} | {f'{one.gpu_from:,} {noun}' if one.gpu_from else ''} |", flush=True)
    host = measured()
    where = f"{host['machine']['cpu']}, {host['place']}; {host['when'][:10]}, commit {host['git']['sha'][:8]}"
    print(f"\nThe host: {where}.")


def _milliseconds(seconds: float) -> str:
    """Return a predicted time in milliseconds, with three digits."""
    return f"{1e3 * seconds:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
