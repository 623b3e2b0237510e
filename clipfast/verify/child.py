"""Run a leg of the verification (CPU paths, or interpreted kernels) in another process.

Another process is needed because Triton decides when it is imported whether it interprets kernels. The child process
writes one line of JSON for each check, and a last line when it has finished. If it crashes, hangs or ends early, this
becomes a failed result with the end of its stderr.
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any

from ..kernels.spec import INTERPRETER
from .options import SANITIZER, Options
from .report import FAIL, CheckResult

PROGRAM = "from clipfast.verify.child import main; main()"
FINISHED = "finished"
Groups = Generator[list[CheckResult], None, None]
STDERR_TAIL = 1500  # a failed result holds at most this many last characters of the process's stderr


@contextlib.contextmanager
def children(options: Options, legs: Iterable[str], **changed: Any) -> Iterator[list[Groups]]:
    """Start a subprocess for each of ``legs``, with some options changed, and end them all when the context ends."""
    with contextlib.ExitStack() as stack:
        of_legs = {leg: dataclasses.replace(options, legs=(leg,), device="cpu", **changed).to_dict() for leg in legs}
        yield [
            stack.enter_context(contextlib.closing(groups_of_child(of_leg, leg, options.hang_seconds)))
            for leg, of_leg in of_legs.items()
        ]


def groups_of_child(options: dict[str, Any], leg: str, hang_seconds: float) -> Groups:
    """Start a leg of the verification ("cpu" or "interpreter") in a subprocess; return a generator of its results.

    The subprocess starts at once and runs in parallel to the caller, on one thread. It is killed if the generator is
    closed, or if it writes nothing for ``hang_seconds`` while the caller waits for it. ``options`` come from
    :meth:`clipfast.verify.Options.to_dict`.
    """
    groups = _groups(options, leg, hang_seconds)
    next(groups)
    return groups


def _groups(options: dict[str, Any], leg: str, hang_seconds: float) -> Groups:
    """Yield an empty group as soon as the verification's subprocess runs, and then the results of each check."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if leg in (INTERPRETER, SANITIZER):
        # NumPy multiplies the tiles of interpreted kernels. With these kernels of OpenBLAS, which every x86 has, an
        # element is rounded alike wherever it stands in the product, as in a GPU's matrix unit; with others it may not.
        environment |= {"OPENBLAS_CORETYPE": "Prescott", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if leg == INTERPRETER:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(options)],
            stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=environment, text=True,
        )  # fmt: skip
        try:
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            yield []
            yield from _results(process, lines, leg, hang_seconds, stderr)
        finally:
            process.kill()
            process.wait()


def _results(
    process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]", leg: str, hang_seconds: float, stderr: IO[str]
) -> Iterator[list[CheckResult]]:
    """Yield the results that the verification's subprocess writes, and an error if it ends or hangs."""
    last = "before its first check"
    while True:
        try:
            line = lines.get(timeout=hang_seconds)
        except queue.Empty:
            process.kill()
            yield [_failed(leg, f"hung: silent for {hang_seconds:.0f} s, {last}", stderr)]
            return
        if line is None:
            code = process.wait()
            yield [_failed(leg, f"ended early with exit code {code}, {last}", stderr)]
            return
        message = json.loads(line)
        if message == FINISHED:
            return
        rows = [CheckResult.from_dict(raw) for raw in message]
        last = f"after {' '.join(part for part in rows[-1].group if part)}"
        yield rows


def _read(stream: IO[str] | None, lines: "queue.Queue[str | None]") -> None:
    """Put the lines of the verification's subprocess into a queue."""
    with contextlib.suppress(ValueError, OSError):
        for line in stream or ():
            lines.put(line)
    lines.put(None)


def _failed(leg: str, what: str, stderr: IO[str]) -> CheckResult:
    """Return a failed result for the process of a leg; ``what`` happened to it, such as "hung: silent for 300 s"."""
    stderr.flush()
    stderr.seek(0)
    tail = stderr.read()[-STDERR_TAIL:].strip()
    reason = f"the process of the {leg} leg {what}" + (f"; its stderr ends:\n{tail}" if tail else "")
    return CheckResult("legs", leg, "process", "subprocess", verdict=FAIL, reason=reason)


def main() -> None:
    """Run one leg of the verification in this process, with the options in ``sys.argv[1]`` (JSON)."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output to stdout goes to stderr, so that only results reach the parent through the pipe
    from .ops import timed
    from .other_runs import surroundings_of
    from .runner import checks

    options = Options.from_dict(json.loads(sys.argv[1]))
    (leg,) = options.legs or ()
    with surroundings_of(leg) if options.others else contextlib.nullcontext():
        for check in checks(options, leg):
            rows = [row.to_dict() for row in timed(check.rows, check.template)]
            print(json.dumps(rows, allow_nan=False), file=out, flush=True)
    print(json.dumps(FINISHED), file=out, flush=True)
