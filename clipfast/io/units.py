"""Numbers for people: with three digits and the largest fitting unit, such as KiB or MiB."""

from collections.abc import Sequence

BYTES = ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B"))
COUNTS = ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1, ""))
ONES = COUNTS[-1:]
SECONDS = ((1, " s"), (1e-3, " ms"), (1e-6, " us"))


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Format ``value`` as text in the largest unit that fits; ``units`` are descending: 1536 bytes are ``1.50 KiB``."""
    factor, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    number = value / factor
    is_whole = value == 0 or (factor == 1 and number == int(number))
    digits = 0 if is_whole or number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{digits}f}{unit}"
