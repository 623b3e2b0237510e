"""The summary of ``bench.gpu``. This module imports only the standard library, so that nothing can break it."""

import dataclasses
import getpass
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Done:
    """A step that has ended: name, result, how long it took, the end of its output, and the kernels it compiled."""

    name: str
    result: str
    seconds: float
    lines: list[str]
    compiled: int = 0


STUB_NOTE = "REHEARSAL on the stub driver: no kernel ran, and no time, error or table here means anything."


def summarise(
    done: list[Done], out: Path, cached: Mapping[str, int], environment: Mapping[str, str], *, stub: bool = False
) -> None:
    """Write summary.txt: the end of each step's output, then refusals, caches, and the result of each step.

    ``cached`` is what :func:`cache_entries` said before the first step. With ``stub``, it says first and last that it
    is a rehearsal.
    """
    lines: list[str] = [STUB_NOTE, ""] if stub else []
    for step in done:
        lines += [f"-- {step.name}", *step.lines, ""]
    lines += [line for path in sorted(out.glob("bench-*.json")) for line in _refusals(path)]
    for name, now in cache_entries(environment).items():
        lines.append(f"{name} cache: {cached[name]} entries at the start, {now} now")
    lines += [f"{step.name:12} {step.result:20} {step.compiled:4} compiled {step.seconds:6.1f} s" for step in done]
    lines += [STUB_NOTE] if stub else []
    (out / "summary.txt").write_text("\n".join(lines) + "\n")


def cache_entries(environment: Mapping[str, str]) -> dict[str, int]:
    """Count the entries of the compilers' caches: with an empty cache, a step takes longer."""
    inductor = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    folders = {
        "triton": Path(environment.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "inductor": Path(environment.get("TORCHINDUCTOR_CACHE_DIR") or inductor),
    }
    return {name: sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0 for name, folder in folders.items()}


def _refusals(path: Path) -> Iterator[str]:
    """Yield what was not timed, or not timed like the others; and in one line the candidates that are not installed."""
    missing: dict[str, str] = {}
    for case in json.loads(path.read_text())["cases"]:
        label = " ".join([case["op"], *(f"{key}={value}" for key, value in case["shape"].items()), case["dtype"]])
        for candidate in case["candidates"]:
            reason = candidate["refused"]
            if reason and reason.startswith("missing: "):
                missing[candidate["name"]] = reason
            elif reason or candidate["eager"]:
                word = "refused" if reason else "no CUDA graph"
                yield f"{word}: {label}: {candidate['name']}: {reason or candidate['eager']}"
    if missing:
        yield f"{path.name}: " + "; ".join(f"{name}: {reason}" for name, reason in missing.items())
