"""Keys of samples: the names under which a sample has its image and its captions."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
IMAGE_KEYS = (*IMAGE_EXTENSIONS, "image", "img", "filepath", "file_name", "path")
TEXT_KEYS = ("txt", "caption", "text", "title")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys under which the image and the captions of a sample are looked for, in this order.

    Attributes:
        images: extensions of the image's member; or, in a table, columns with the name of the image's file.
        texts: extensions of the caption's member; or, if the sample has no such member, keys of its json that hold a
            caption or a list of captions.
        is_json: whether captions are only looked for in the json.
        weights: how often each of ``texts`` is looked for first in the json, relative to the others. Keys with weight 0
            come last. Without weights, the order is always the same.
    """

    images: tuple[str, ...] = IMAGE_KEYS
    texts: tuple[str, ...] = TEXT_KEYS
    is_json: bool = False
    weights: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: Any) -> Keys:
        """Construct the keys of a sample from a dict of these attributes, which was read from JSON.

        Raises:
            ValueError: the dict does not describe keys.
        """
        kinds = {"images": str, "texts": str, "weights": int | float}
        is_right = isinstance(values, dict) and all(
            isinstance(value, bool) if name == "is_json"
            else name in kinds and isinstance(value, list) and all(isinstance(one, kinds[name]) for one in value)
            for name, value in values.items()
        )  # fmt: skip
        if not is_right:
            raise ValueError(f"keys of images and texts are lists of names, got {values!r:.200}")
        found: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        return cls(**found)

    def ordered_texts(self, rng: random.Random | None) -> Sequence[str]:
        """Return the caption keys in the order of their search in a sample's json; with weights, ``rng`` draws it."""
        if rng is None or not self.weights:
            return self.texts
        # Each key gets an exponential random time whose rate is the key's weight. So the probability that a key comes
        # first is proportional to its weight.
        turns = [rng.expovariate(weight) if weight else math.inf for weight in self.weights]
        return [self.texts[place] for place in sorted(range(len(turns)), key=turns.__getitem__)]


DEFAULT_KEYS = Keys()


def read_keys(
    image_key: str | None = None,
    text_key: str | None = None,
    json_text_key: Sequence[str] = (),
    json_text_key_probs: Sequence[float] = (),
) -> Keys:
    """Parse the flags for the keys of samples; each value may have alternatives, separated by ';'.

    Raises:
        ValueError: a flag names no key, or the probabilities do not fit.
    """
    images = IMAGE_KEYS if image_key is None else _split("--image-key", image_key)
    texts = TEXT_KEYS if text_key is None else _split("--text-key", text_key)
    if json_text_key:
        texts = _split("--json-text-key", ";".join(json_text_key))
    weights = tuple(float(weight) for weight in json_text_key_probs)
    missing = len(texts) - len(weights)
    if weights and (not json_text_key or missing < 0):
        keys = f"the {len(texts)} keys of --json-text-key" if json_text_key else "no --json-text-key"
        raise ValueError(f"--json-text-key-probs has {len(weights)} values for {keys}: at most one for each key")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"--json-text-key-probs must not be negative, got {' '.join(map(str, weights))}")
    return Keys(images, texts, bool(json_text_key), weights and weights + (0.0,) * missing)


def read_separator(text: str | None) -> str | None:
    r"""Parse the value of ``--csv-separator``: one character, or backslash and t for a tab.

    Raises:
        ValueError: it is not a character that can separate fields.
    """
    separator = "\t" if text == "\\t" else text
    if separator is not None and (len(separator) != 1 or not separator.isascii() or separator in '"\r\n\0'):
        raise ValueError(f"--csv-separator must be one ASCII character, or \\t for a tab, got {text!r}")
    return separator


def _split(flag: str, text: str) -> tuple[str, ...]:
    """Split the alternatives of a flag that names the keys of samples."""
    keys = tuple(key.strip() for key in text.split(";") if key.strip())
    if not keys:
        raise ValueError(f"{flag} names no key: {text!r}")
    return keys
