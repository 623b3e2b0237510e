"""``clipfast verify``: its arguments, its progress bar and its report."""

import argparse
import contextlib
import pkgutil
import sys
import time
from typing import Any

from .arguments import COUNT, add_output

DESCRIPTION = """\
Compare every kernel, a whole model and a training curve with PyTorch, and say by how much they keep the rule below.

The rule: against a float64 truth, the maximum and the RMS error of each output are at most 2x PyTorch's own error at
the same dtype (3x for gradients), plus one unit in the last place of each value. NaN and infinity sit where the truth
has them. Each row shows three figures for either error: ours, PyTorch's, allowed.

On a CPU: the PyTorch paths in this process, and the Triton kernels interpreted in a second one (float32, float16).
On a GPU: the Triton kernels natively, at the sizes of real use. Checks that could not run are listed.

With MODULE:NAME, check your own kernel by this rule, and see what the compiler makes of it: docs/verify-others.md."""

EPILOG = """\
examples:
  clipfast verify --quick                              a minute: is this installation sound?
  clipfast verify                                      everything that this machine can run
  clipfast verify --op attention --dtype fp32          one op
  clipfast verify --op model --model ViT-B-32 --against openclip hf
  clipfast verify --junit verify.xml --json verify.json      for CI
  clipfast verify --golden golden.json                 ten training steps, against those in the file
  clipfast verify my_kernels.py:SOFTMAX --html softmax.html    somebody else's kernel

exit code: 0 all that ran passed, 1 something failed, 2 bad arguments, 130 interrupted"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast verify``."""
    from ..verify.options import OPS

    parser = commands.add_parser(
        "verify", description=DESCRIPTION, epilog=EPILOG,
    )  # fmt: skip
    add, several = parser.add_argument, {"nargs": "+", "action": "extend"}
    checks = "clipfast.verify.KernelCheck or OpSpec in a module or a file: checks of other kernels than clipfast's"
    add("others", nargs="*", metavar="MODULE:NAME", help=checks)
    add("--arch", **several, type=COUNT, metavar="N", help="GPU architectures for other kernels (default: 80 90)")
    add("--op", **several, metavar="OP", help=f"checks to run: {', '.join(OPS)} (default: all)")
    add("--model", **several, metavar="NAME", help="models for the model check (default: ViT-T-8-32)")
    add("--dtype", **several, metavar="DTYPE", help="fp32, fp16, bf16 (default: all)")
    peers = "openclip, hf: other models with the same weights (default: openclip if installed)"
    add("--against", **several, metavar="PEER", help=peers)
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    golden = "compare ten steps of training with FILE: equal bits on the same kind of device; written if missing"
    add("--golden", default="", metavar="FILE", help=golden)
    add("--update", action="store_true", help="write the steps of this kind of device into the file of --golden")
    add("--quick", action="store_true", help="fewer cases: about a minute on two cores")
    add("--all-rows", action="store_true", help="print every output, not the nearest to its limit")
    add_output(parser, "--junit", is_held=False, help="write JUnit XML, a testcase for each row")
    add_output(parser, "--html", is_held=False, help="write a page of all rows, to send to the kernel's author")
    add_output(parser, "--json", is_held=False, help="write all rows, kept up to date while it runs")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast verify``: run the checks, print the report, and return the exit code."""
    from ..verify.options import Options
    from ..verify.report import CheckResult, exit_code, summary, table, write_html
    from ..verify.runner import run_verify
    from .main import COMPILER

    given = {"ops": args.op, "models": args.model, "dtypes": args.dtype, "against": args.against}
    given |= {"others": args.others or None, "archs": args.arch}
    chosen: dict[str, Any] = {key: tuple(value) for key, value in given.items() if value is not None}
    options = Options(device=args.device, quick=args.quick, golden=args.golden, update=args.update, **chosen)
    compiled = pkgutil.resolve_name(COMPILER) if args.others else None
    rows: list[CheckResult] = []
    started, complete = time.perf_counter(), False
    bar: Any = None
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        # ``disable=None`` shows the bar only on a terminal.
        bar = tqdm(unit="case", desc="verify", leave=False, file=sys.stderr, disable=None)
    shown: dict[str, Any] = {} if bar is None else {"on_total": bar.reset, "on_group": lambda _: bar.update()}
    try:
        run_verify(options, json_path=args.json, junit_path=args.junit, compiled=compiled, rows=rows, **shown)
        complete = True
    except KeyboardInterrupt:
        print("clipfast verify: interrupted", file=sys.stderr)
    finally:
        if bar is not None:
            bar.close()
    if rows:
        if args.html is not None:
            write_html(args.html, rows)
        print(table(rows, all_rows=args.all_rows), end="\n\n")
    print(summary(rows, time.perf_counter() - started, complete=complete))
    return exit_code(rows) if complete else 130
