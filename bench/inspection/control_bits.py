"""Check the control bits of compiled kernels for sm_120 by basalt, a checker of others (``pip install basalt-sass``).

An instruction's control bits say how many cycles the next one waits, and which loads it waits for. The hardware does
not check them: where they are wrong, an instruction reads a register too early.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

ARCH = 120  # the compute capability that basalt knows
PACKAGE = "basalt-sass"
_SUMMARY = re.compile(r"^  (\d+ instructions .*: (?:clean|(\d+) errors, \d+ warnings))$", re.MULTILINE)
_ERROR = re.compile(r"^  \[error\] (.*)$", re.MULTILINE)


def check_control_bits(cubin: bytes) -> tuple[bool | None, str]:
    """Return whether basalt finds no error in a cubin for sm_120, and its message; None if basalt cannot run.

    basalt's warnings rest on latencies that its authors have not measured, so the message only counts them.
    """
    if importlib.util.find_spec("basalt") is None:
        return None, f"{PACKAGE} is not installed: pip install {PACKAGE}"
    tools = str(Path(triton.knobs.nvidia.nvdisasm.path).parent)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [sys.executable, "-c", "import sys; from basalt.cli import main; sys.exit(main())"]
        run = subprocess.run([*command, "--cuda-bin", tools, "verify", str(path)], capture_output=True, text=True)
    found = _SUMMARY.search(run.stdout)
    if found is None:
        said = (run.stderr or run.stdout).strip().splitlines()
        return None, f"{PACKAGE} failed: {said[-1] if said else f'exit code {run.returncode}'}"
    errors = _ERROR.findall(run.stdout)
    return int(found[2] or 0) == 0, "; ".join([found[1], *errors[:1]])
