"""Clocks, power and throttling of the first GPU during the steps of ``bench.gpu``, by ``nvidia-smi`` once a second."""

import contextlib
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

LIMITS = ("sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown")
QUERY = ("clocks.sm", "power.draw", "temperature.gpu", *(f"clocks_throttle_reasons.{limit}" for limit in LIMITS))
COMMAND = ("nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "--loop=1")


@contextlib.contextmanager
def sampled(path: Path) -> Iterator[None]:
    """Write a line of samples to ``path`` each second of this context; where there is no ``nvidia-smi``, write none."""
    with path.open("w") as file:
        try:
            process = subprocess.Popen(COMMAND, stdout=file, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        except OSError:
            yield
            return
        try:
            yield
        finally:
            process.kill()
            process.wait()


def lines_of(path: Path) -> list[str]:
    """Return the lines of samples of the GPU that have been written to ``path``."""
    return path.read_text().splitlines() if path.exists() else []


def described(lines: list[str]) -> str | None:
    """Return in words the median and the range of clock, power and temperature of a GPU in lines of samples.

    The text also says for how many seconds each limit throttled the GPU. It is None if the lines hold no sample.
    """
    samples = [[cell.strip() for cell in line.split(",")] for line in lines]
    samples = [cells for cells in samples if len(cells) == len(QUERY)]
    words = []
    for column, unit in enumerate(("MHz", "W", "°C")):
        values = []
        for cells in samples:
            with contextlib.suppress(ValueError):  # a GPU may not give a value
                values.append(float(cells[column]))
        if values:
            words.append(f"{statistics.median(values):.0f} {unit} ({min(values):.0f} to {max(values):.0f})")
    for limit, *active in zip(LIMITS, *(cells[3:] for cells in samples), strict=True):
        if count := active.count("Active"):
            words.append(f"{limit.replace('_', ' ')} in {count} of {len(samples)} s")
    return f"GPU during this step: {', '.join(words)}" if words else None
