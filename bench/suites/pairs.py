"""Generated pairs for benchmarks that take as long to read as pairs from the web: JPEG files, captions, shards."""

import functools
import io
import itertools
import math
import random
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from clipfast import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

SHARDS = 4
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@functools.cache
def jpegs(count: int, width: int, height: int) -> list[bytes]:
    """Return JPEG files for the data benchmark with about as many bits per pixel as a photograph."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=85)
        files.append(out.getvalue())
    return files


def captions(count: int) -> list[str]:
    """Return captions for the data benchmark, of about ten words (three to fifty), like texts of web images.

    The frequencies of words are as in a language: the n-th word is 1/n as frequent as the first. Every fourth caption
    also has a number, every fourth a name that occurs in no other caption, and every twentieth letters that are not
    ASCII.
    """
    rng = random.Random(0)
    text = " ".join(OPENAI_IMAGENET_TEMPLATES + IMAGENET_CLASSNAMES).replace("{}", "").replace(".", "")
    words = list(dict.fromkeys(text.split()))
    weights = [1 / (rank + 1) for rank in range(len(words))]
    made = []
    for number in range(count):
        length = min(max(round(math.exp(rng.gauss(math.log(10), 0.6))), 3), 50)
        chosen = rng.choices(words, weights, k=length)
        if number % 4 == 0:
            chosen.append(str(rng.randrange(1900, 2100)))
        if number % 4 == 1:
            chosen.append("".join(rng.choices(LETTERS, k=8)).capitalize())
        if number % 20 == 2:
            chosen.append("– café")
        made.append(" ".join(chosen))
    return made


@functools.cache
def _folder(count: int, width: int, height: int) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder with the data benchmark's shards, which is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="clipfast-bench-")
    images, texts = jpegs(count, width, height), captions(count)
    bounds = [count * shard // SHARDS for shard in range(SHARDS + 1)]
    for shard, (first, stop) in enumerate(itertools.pairwise(bounds)):
        with tarfile.open(Path(folder.name) / f"{shard:05d}.tar", "w") as tar:
            for number in range(first, stop):
                for extension, content in (("jpg", images[number]), ("txt", texts[number].encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def shards(count: int, width: int, height: int) -> list[str]:
    """Return the names of tar files with ``count`` pairs in total, generated for the data benchmark."""
    return sorted(str(path) for path in Path(_folder(count, width, height).name).glob("*.tar"))
