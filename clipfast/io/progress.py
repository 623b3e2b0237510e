"""Progress with rate and remaining time: a bar on a terminal, or lines of text elsewhere if the work takes long."""

import contextlib
import datetime
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

FIRST, LONGEST = 5.0, 60.0  # seconds until the first line, and longest time between two lines

T = TypeVar("T")
Advance = Callable[[int], object]  # a function that takes the number of newly finished units
# a function of the total, the task's name and the unit's name
Progress = Callable[[int, str, str], contextlib.AbstractContextManager[Advance]]


@contextlib.contextmanager
def progress(total: int, what: str, unit: str, *, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of work with ``total`` units; the context yields a function that takes newly finished units."""
    if not shown:
        yield lambda _: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=unit, leave=False) as bar:
            yield bar.update
    else:
        yield lines(total, what, unit, functools.partial(print, file=sys.stderr, flush=True))


def each(items: Iterable[T], what: str, unit: str, total: int | None = None, *, shown: bool = True) -> Iterator[T]:
    """Yield ``items`` and show progress over them; ``total`` is their number if they have no length."""
    with progress(len(items) if isinstance(items, Sized) else total or 0, what, unit, shown=shown) as advance:
        for item in items:
            yield item
            advance(1)


def lines(total: int, what: str, unit: str, say: Callable[[str], Any]) -> Advance:
    """Return a function that takes newly finished units and prints progress lines, at growing intervals."""
    started = said = time.monotonic()
    done, pause = 0, FIRST

    def advance(new: int) -> None:
        """Count newly finished units, and print a progress line if enough time has passed."""
        nonlocal said, done, pause
        done, now = done + new, time.monotonic()
        if now - said < pause or done >= total:
            return
        said, pause = now, min(2 * pause, LONGEST)
        rate = done / (now - started)
        left = "" if done == 0 else f", {duration((total - done) / rate)} left"
        say(f"{what}: {done:,} of {total:,}, {rate:.3g} {unit}/s{left}")

    return advance


def duration(seconds: float) -> str:
    """Return a duration, such as the time left, as text: hours, minutes and seconds, and days if there are any."""
    return str(datetime.timedelta(seconds=round(seconds)))
