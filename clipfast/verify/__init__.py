"""``clipfast verify``: compare the numerics of every op, of whole models and of a training curve with PyTorch's.

``rule`` is the rule for errors. ``ops``, ``models`` and ``curve`` are the checks. A check runs on a leg: the CPU paths,
the kernels in Triton's interpreter, or the kernels on a GPU. ``options`` and ``runner`` choose the checks that run,
``child`` runs a leg in another process, and ``report`` writes the results.

    from clipfast.verify import Options, exit_code, run_verify
    rows = run_verify(Options(ops=("attention",)), json_path=Path("verify.json"))
"""

from .options import Options
from .others import KernelCheck
from .report import CheckResult, exit_code, read_json, summary, table, write_json, write_junit
from .rule import Figure, Judgement, judge
from .runner import iter_groups, run_verify

__all__ = [
    "CheckResult", "Figure", "Judgement", "KernelCheck", "Options", "exit_code", "iter_groups", "judge", "read_json",
    "run_verify", "summary", "table", "write_json", "write_junit",
]  # fmt: skip
