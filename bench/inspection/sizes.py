"""The predicted time of the contrastive loss over many sizes, and how many times its floor that is:

    python -m clipfast.bench.inspection.sizes                                  1,024 to 131,072 pairs, 512 to 1,280 wide
    python -m clipfast.bench.inspection.sizes --pairs 4096 --widths 512 768    some of them

Both passes in bfloat16 on an H100, with all PyTorch ops. The floor is that of the op: four products at the rate that
the power allows, or the bytes of features and gradients, whichever takes longer. A size whose factor stands out is a
cliff.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import specs

from .forecast import forecast_shape
from .model import FULL, H100, QUICK, Effort

PAIRS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
WIDTHS = (512, 640, 768, 1024, 1280)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table that the command line asks for, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="contrastive_loss", choices=("contrastive_loss", "sigmoid_loss"))
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, metavar="N", help="numbers of pairs")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="D", help="widths of the features")
    parser.add_argument(
        "--quick", action="store_true", help="run less of each kernel: within 2%% of the whole for most"
    )
    args = parser.parse_args(arguments)
    for line in table(args.op, args.pairs, args.widths, QUICK if args.quick else FULL):
        print(line, flush=True)
    return 0


def table(op: str, pairs: Sequence[int], widths: Sequence[int], effort: Effort) -> Iterator[str]:
    """Yield the lines of a Markdown table: milliseconds, and the factor over the floor."""
    yield f"| pairs | {' | '.join(f'D = {width}' for width in widths)} |"
    yield "|" + " --- |" * (1 + len(widths))
    for number in pairs:
        cells = []
        for width in widths:
            seconds, floor = time_and_floor(op, number, width, effort)
            cells.append(f"{1e3 * seconds:.3g} ms, {seconds / floor:.2f}x")
        yield f"| {number:,} | {' | '.join(cells)} |"


def time_and_floor(op: str, pairs: int, width: int, effort: Effort) -> tuple[float, float]:
    """Return the predicted seconds of both passes of a loss in bfloat16, and those of its floor."""
    spec = specs()[op]
    shape = spec.bench["cuda"][0].changed(pairs=pairs, embed_dim=width)
    found = forecast_shape(spec, shape, "bf16", H100, H100.power_flops, effort)
    floors = [spec.floor(shape, DTYPES["bf16"].itemsize, backward) for backward in (False, True)]
    least = [max(floor.flops / H100.power_flops, floor.bytes / H100.hbm_rate) for floor in floors]
    return found.seconds, sum(least)


if __name__ == "__main__":
    sys.exit(main())
