"""The time that the host takes to start the kernels of an op or a step, and the batch from which the GPU takes longer.

``host.json`` has the times that ``python -m clipfast.bench host --stub`` measured on one machine: for each op
at a few small shapes, and for steps of models, the microseconds of a call and the number of kernels that it starts. A
larger shape takes the same Python code, but may start more kernels: a loss starts several for each block of logits, and
each further kernel takes ``FURTHER`` microseconds. The host's time of a step, or of a call with fewer kernels, is the
time of the most similar measured call, scaled by the number of kernels.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..case import OURS

FILE = Path(__file__).with_name("host.json")
LARGEST = 2**24  # the search for the batch from which the GPU takes longer ends here
STEP = "step"
# The host's microseconds for each further kernel. They were measured like those in host.json, as the difference between
# a contrastive loss of one block of logits and losses of 4 to 64 blocks.
FURTHER = 21.0


@functools.cache
def measured() -> dict[str, Any]:
    """Return the host's time as it was measured: the machine, and a row for each call."""
    return json.loads(FILE.read_text())


def host_seconds(name: str, shape: Mapping[str, Any], kernels: int) -> float:
    """Return the time that the host takes for both passes of an op, or for a step, that starts ``kernels``.

    Raises:
        ValueError: the op was not measured.
    """
    rows = [row for row in measured()["rows"] if row["name"] == name]
    if not rows:
        raise ValueError(f"{FILE} has no time of {name}: write it with python -m bench host --stub --json {FILE}")
    row = min(rows, key=lambda row: _differences(row["shape"], shape))
    us, started = list(row["found"][OURS].values())[-1]
    if name == STEP or kernels < started:
        return 1e-6 * us * kernels / started
    return 1e-6 * (us + FURTHER * (kernels - started))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Return the number of options in which two shapes of an op differ; sizes that both have do not count."""

    def differ(name: str) -> bool:
        """Return True if two shapes have different values of an option, for the host's time; sizes do not count."""
        values = one.get(name), other.get(name)
        return values[0] != values[1] and not all(type(value) in (int, float) for value in values)

    return sum(map(differ, one.keys() | other.keys()))


def binds_from(takes_longer: Callable[[int], bool], start: int) -> int | None:
    """Return the least power of two from which the GPU is predicted to take longer than its host, or None.

    Args:
        takes_longer: says whether the GPU takes longer, given the batch.
        start: the batch to begin at, which is best if it is near the result.
    """
    size = 1 << max(0, start.bit_length() - 1)
    if takes_longer(size):
        while size > 1 and takes_longer(size // 2):
            size //= 2
        return size
    while size < LARGEST:
        size *= 2
        if takes_longer(size):
            return size
    return None
