"""Small sets in CLIP_benchmark's offline layout, and encoders for them that are always right, or random."""

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipfast.evaluate.encoder import Encoder

from ..small_runs import picture, write_shard

TEMPLATES = ("a photo of a {c}.", "{c}")


def noisy(number: int, place: int = 0) -> bytes:
    """Return an image of noise for a labelled set, different for each number and split."""
    return picture(1000 * place + number)


def write_set(folder: Path, *, classes=7, images=31, kind="classification", splits=("test",), shards=2, draw=noisy):
    """Write a CLIP_benchmark set: by ``kind``, image i has class i % ``classes``, captions with i, or two classes."""
    folder.mkdir(parents=True)
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"thing {number}\n" for number in range(classes)))
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    if kind != "classification":
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    for place, split in enumerate(splits):
        (folder / split).mkdir()
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
        samples = [sample_of(number, classes, kind, draw(number, place)) for number in range(images)]
        size = -(-images // shards)
        for shard in range(shards):
            write_shard(folder / split / f"{shard}.tar", samples[shard * size : (shard + 1) * size])
    return folder


def sample_of(number: int, classes: int, kind: str, image: bytes) -> dict[str, bytes]:
    """Return the files of a sample of a CLIP_benchmark set."""
    if kind == "retrieval":
        texts = [f"{word} of thing {number}" for word in ("picture", "drawing", "photo")[: 1 + number % 3]]
        return {"webp": image, "txt": "\n".join(texts).encode()}
    if kind == "multilabel":
        return {"webp": image, "npy": row_of({number % classes, (number + 2) % classes}, classes)}
    return {"webp": image, "cls": str(number % classes).encode()}


def row_of(members: set[int], classes: int) -> bytes:
    """Return the labels of an image of a multi-label set, as CLIP_benchmark stores them."""
    stream = io.BytesIO()
    np.save(stream, np.isin(np.arange(classes), list(members)).astype(np.float32))
    return stream.getvalue()


def coded(number: int, place: int = 0) -> bytes:
    """Return an image of a labelled set whose colour encodes number and ``place``, the position of the split."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number, place, 7)).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


class Model(torch.nn.Module):
    """A model that reads the numbers from coded images and from texts, and looks up their features."""

    def __init__(self, of_image, of_text):
        super().__init__()
        self.of_image, self.of_text = of_image, of_text

    def encode_image(self, pixels, normalize=False):
        """Return the features that a model of known accuracy gives to images."""
        return self._features([self.of_image(image) for image in pixels[:, :, 0, 0].tolist()])

    def encode_text(self, ids, normalize=False):
        """Return the features that a model of known accuracy gives to texts."""
        return self._features([self.of_text(row) for row in ids.tolist()])

    def _features(self, found):
        """Stack the features of an evaluated model, and scale them to unit length."""
        return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def numbers_in(texts):
    """Return token ids of each class name or caption: its last number, and two numbers that differ between texts."""
    rows = [[int(([*re.findall(r"\d+", text)] or ["0"])[-1]), len(text), sum(text.encode())] for text in texts]
    return torch.tensor(rows)


def pixels_of(image):
    """Return the pixels of an image of a labelled set, as the transform of a model does."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def perfect(members, width=64):
    """Return an encoder to evaluate that knows the classes of each image and reads the number in each text."""
    hot = torch.eye(width)
    model = Model(lambda image: hot[sorted(members(int(image[0])))].sum(0), lambda row: hot[row[0]])
    return Encoder("perfect", model, numbers_in, pixels_of)


def clueless(seed, width=16):
    """Return an encoder to evaluate whose features are random, so that its accuracy is chance."""

    def drawn(value):
        """Return random features of an encoder without knowledge, the same for equal inputs."""
        digest = hashlib.sha256(repr((seed, value)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(width, generator=generator)

    return Encoder(f"clueless {seed}", Model(drawn, drawn), numbers_in, pixels_of)
