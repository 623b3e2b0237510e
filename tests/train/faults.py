"""Training samples with nine kinds of faults, for tests of the data pipeline."""

import functools
import io

from PIL import Image

from ..small_runs import picture, sample

PLACES = range(7, 180, 20)  # the positions of the faulty samples among 180


@functools.cache
def faults() -> dict[str, dict[str, bytes | None]]:
    """Return, by fault of a training sample, the members to replace in a good sample, or to remove if None."""
    whole, bomb = picture(5, size=64), io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    return {
        "broken image": {"png": whole[: len(whole) // 2]},
        "empty image": {"png": b""},
        "not an image": {"png": b"<html>404</html>"},
        "huge image": {"png": bomb.getvalue()},
        "no image": {"png": None},
        "no caption": {"txt": b" \n"},
        "broken caption": {"txt": b"\xff\xfe"},
        "broken json": {"json": b"{"},
        "no such field": {"json": b"{}"},
    }


def faulty_samples() -> list[dict[str, bytes]]:
    """Return 180 training samples, of which one in twenty has a fault: each of the nine faults occurs once."""
    samples = [sample(index) for index in range(180)]
    for place, changes in zip(PLACES, faults().values(), strict=True):
        changed = samples[place] | changes
        samples[place] = {extension: content for extension, content in changed.items() if content is not None}
    return samples
