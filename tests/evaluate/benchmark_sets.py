"""Small data sets in CLIP_benchmark's offline layout, and encoders that are perfect, random, or see only colours."""

import hashlib
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast.evaluate.encoder import Encoder

from ..small_runs import picture, write_shard

TEMPLATES = ("a photo of a {c}.", "{c}")


def noisy(number: int, place: int = 0) -> bytes:
    """Return an image of noise for a labelled set, another one for each number and position ``place`` of the split."""
    return picture(1000 * place + number)


def write_set(folder: Path, *, classes=7, images=31, kind="classification", splits=("test",), shards=2, draw=noisy):
    """Write a CLIP_benchmark set, whose ``kind`` is "classification", "retrieval" or "multilabel".

    Image i has the class i % ``classes``, or captions with the number i, or two classes.
    """
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
    """A model that reads the number in a coded image or in a text, and looks up a feature by this number."""

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
        return F.normalize(torch.stack(found), dim=-1)


def numbers_in(texts):
    """Return the token ids of each class name or caption: its last number, its length, and the sum of its bytes."""
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


COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40),
    "cyan": (40, 210, 210), "violet": (200, 50, 210), "grey": (128, 128, 128),
}  # fmt: skip
NAMES = sorted(COLOURS)


class ByColour(Encoder):
    """A model that classifies an image by its mean colour, and a text by the last colour that the text names.

    The model's name is "perfect", or the share of the images whose colour it sees. Its errors are the same in every
    process, and for every batch.
    """

    @classmethod
    def load(cls, name, pretrained=None, **_):
        """Return the model of this name, in place of an encoder that ``clipfast eval`` loads."""
        return cls(name, SimpleNamespace(logit_scale=torch.tensor(100.0).log()), None, mean_colour, "cpu", pretrained)

    def about(self):
        """Return the name and weights by which a feature store identifies the model."""
        return {"model": self.name, "pretrained": self.pretrained}

    def images(self, pixels):
        """Return one-hot image features of the colours; the model's name gives the share of right ones."""
        found = pixels.flatten(1).float()
        near = torch.cdist(found, torch.tensor([COLOURS[name] for name in NAMES]).float()).argmin(1)
        if self.name != "perfect":
            keys = (found @ torch.tensor([977.0, 31.0, 7.0]) % 101) / 101
            spread = (found @ torch.tensor([13.0, 457.0, 3.0])).long() % len(NAMES)
            near = torch.where(keys < float(self.name), near, spread)
        return F.one_hot(near, len(NAMES)).float()

    def texts(self, texts, store=None, world=None):
        """Return text features by the last colour that a class name or a caption names."""
        last = [[NAMES.index(word) for word in text.split() if word in COLOURS][-1] for text in texts]
        return F.one_hot(torch.tensor(last, dtype=torch.long), len(NAMES)).float()


def mean_colour(image):
    """Return the mean colour of a picture, as the transform of a model that knows colours."""
    return torch.from_numpy(np.asarray(image, np.float32).mean((0, 1)).round())[:, None, None]


def solid(*colours, size=16):
    """Return a PNG file with stripes of colours, as an image of an evaluation set."""
    image = Image.new("RGB", (size * len(colours), size))
    for place, colour in enumerate(colours):
        image.paste(COLOURS[colour], (place * size, 0, (place + 1) * size, size))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
