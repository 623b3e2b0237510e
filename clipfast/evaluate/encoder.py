"""Encoders for evaluations: a model of clipfast, or of any package with the same methods, with its preprocessing."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adopt import apply_to_open_clip
from ..checkpoints.sources import resolve_source
from ..distributed.world import ALONE, World
from ..factory import create_model, get_tokenizer, transform_of
from ..io.progress import each
from ..kernels.fp8.support import check_fp8
from ..models import CLIP
from ..models.packed_images import PackedImages
from ..models.registry import registered
from .store import FeatureStore
from .zero_shot import TEXTS, Template, encode_texts, prompts_of

if TYPE_CHECKING:
    from PIL import Image

Change = Callable[["Image.Image"], "Image.Image"]
OPEN_CLIP_PREFIX = "open_clip:"
PROBES = ("a photo of a cat.", "Größe: 10 000 × 3, naïve 猫 &amp; Co.", "word " * 100)


@dataclasses.dataclass
class Encoder:
    """A model together with its tokenizer and its image transform.

    Attributes:
        name: the name of the model, for messages and results.
        model: the model in evaluation mode; its ``encode_image`` and ``encode_text`` take ``normalize=True``.
        tokenizer: turns a list of texts into ids.
        transform: turns a PIL image into a tensor [3, H, W]. A transform with an attribute ``patch_size`` (NaFlex)
            gives images of several sizes.
        device: the device of the model.
        pretrained: the name of the weights, for messages and results.
        normalize: whether the features of images are scaled to unit length.
        image_seq_len: for a NaFlex model, the largest number of patches of an image, if the user set it; otherwise
            None.
    """

    name: str
    model: Any
    tokenizer: Any
    transform: Callable[..., Tensor]
    device: str | torch.device = "cpu"
    pretrained: str | None = None
    normalize: bool = True
    image_seq_len: int | None = None

    @classmethod
    def load(
        cls, name: str, pretrained: str | None = None, *, device: str, tokenizer_file: str | None = None,
        cache_dir: str | Path | None = None, backend: str = "auto", image_seq_len: int | None = None,
    ) -> "Encoder":  # fmt: skip
        """Build an encoder for evaluation, by the arguments of :func:`clipfast.create_model` and ``get_tokenizer``.

        ``name`` may be OpenCLIP's JSON file of a model. ``image_seq_len`` is the largest number of patches of an image,
        for NaFlex models. For a ``name`` that starts with ``open_clip:``, OpenCLIP builds the model, and clipfast's
        kernels are applied to it.

        Raises:
            ValueError: the model has no weights, there is no such model, or OpenCLIP is not installed.
        """
        if not name.startswith(OPEN_CLIP_PREFIX):
            source = dataclasses.replace(resolve_source(registered(name), pretrained, cache_dir=cache_dir), name=name)
            model = create_model(
                source, require_pretrained=True, device=device, backend=backend, force_image_seq_len=image_seq_len
            ).eval()
            tokenizer = get_tokenizer(source, tokenizer_file=tokenizer_file)
            transform = transform_of(model, uint8=True)
            return cls(name, model, tokenizer, transform, device, pretrained, image_seq_len=image_seq_len)
        try:
            import open_clip
        except ImportError as error:
            raise ValueError(f"--model {name} needs OpenCLIP: pip install open-clip-torch") from error
        theirs = name.removeprefix(OPEN_CLIP_PREFIX)
        if image_seq_len is not None:
            raise ValueError(f"--image-seq-len is for NaFlex models of clipfast, and {name} is built by OpenCLIP")
        if not pretrained and ":" not in theirs:
            raise ValueError(f"{name} has no weights of its own: give --pretrained a tag of OpenCLIP or a checkpoint")
        folder = None if cache_dir is None else str(cache_dir)
        build = open_clip.create_model_and_transforms
        try:
            model, _, transform = build(theirs, pretrained, device=device, cache_dir=folder)
        except (AssertionError, RuntimeError) as error:  # so OpenCLIP says that weights are another model's
            reason = " ".join(str(error).split())
            raise ValueError(f"OpenCLIP does not build {theirs} with {pretrained}: {reason:.300}") from error
        apply_to_open_clip(model)
        return cls(name, model.eval(), open_clip.get_tokenizer(theirs), transform, device, pretrained)

    def set_fp8(self, recipe: str | None) -> None:
        """Make the model's transformer blocks multiply in fp8 by a recipe of ``fp8_linear``; None undoes this.

        Raises:
            ValueError: the GPU has no fp8.
        """
        check_fp8("fp8", torch.device(self.device))
        if isinstance(self.model, CLIP):
            self.model.set_fp8(recipe)
        else:
            apply_to_open_clip(self.model, fp8=recipe)

    @functools.cached_property
    def blank(self) -> Tensor:
        """A black image [3, H, W] of the largest size that the transform of the evaluated model returns."""
        from PIL import Image

        # A NaFlex transform enlarges an image by at most 100 times. From 64 x 64 pixels, this is enough to reach the
        # largest number of patches.
        return self.transform(Image.new("RGB", (64, 64)))

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of all that determines a model's features: weights, architecture, transform and tokenizer."""
        model = self.model
        found = hashlib.sha256(repr(model.config if hasattr(model, "config") else model).encode())
        found.update(re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform)).encode())
        found.update(repr(self.tokenizer(list(PROBES)).tolist()).encode())  # ids of sample texts identify the tokenizer
        for name, value in model.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return the names and the digest of the model, by which stored features are identified."""
        about: dict[str, Any] = {"model": self.name, "pretrained": self.pretrained, "digest": self.digest}
        about |= {} if self.image_seq_len is None else {"image_seq_len": self.image_seq_len}
        return about if self.normalize else {**about, "normalized": False}

    @torch.no_grad()
    def images(self, pixels: Tensor | PackedImages) -> Tensor:
        """Return the features [B, D] of images [B, 3, H, W], or of packed images, by the evaluated model."""
        features: Tensor = self.model.encode_image(pixels.to(self.device), normalize=self.normalize)
        return features

    @torch.no_grad()
    def texts(self, texts: Sequence[str], store: FeatureStore | None = None, world: World = ALONE) -> Tensor:
        """Return the evaluated model's features [N, D] of texts, of unit length, on rank 0.

        Several ranks share the work; all of them must call this method.

        Args:
            texts: the texts; only rank 0 needs them.
            store: the store that keeps the features, or None.
            world: the ranks. Other ranks get no features.
        """
        distinct = world.on_main(lambda: list(dict.fromkeys(texts)))
        content = hashlib.sha256(json.dumps(distinct).encode()).hexdigest()[:32]
        section = None if store is None else world.on_main(lambda: store.section("texts", self.about()))
        if section is None or not world.on_main(lambda: section.holds(content)):
            batches = [distinct[start : start + TEXTS] for start in range(0, len(distinct), TEXTS)]
            mine = each(batches[world.rank :: world.size], "texts", "batches", shown=world.is_main)
            found = [encode_texts(self.model, self.tokenizer, batch, self.device).cpu() for batch in mine]
            world.meet()  # a barrier with a longer timeout than ``gather``, since the ranks take different times
            everyones = world.gather(found)
            if not world.is_main:
                return torch.empty(0)
            in_order = [everyones[number % world.size][number // world.size] for number in range(len(batches))]
            features = torch.cat(in_order) if in_order else torch.empty(0)
            if section is not None:
                section.save(content, {"features": features}, {"texts": distinct})
        elif world.is_main:
            features = section.load(content)[0]["features"]
        else:
            return torch.empty(0)
        if len(distinct) == len(texts):
            return features.to(self.device)  # not indexed: features may fill half the memory, and indexing copies them
        numbers = {text: number for number, text in enumerate(distinct)}
        return features[[numbers[text] for text in texts]].to(self.device)

    def classifier(
        self, classnames: Sequence[str], templates: Sequence[Template], store: FeatureStore | None = None,
        world: World = ALONE,
    ) -> Tensor:  # fmt: skip
        """Return classifier weights [D, len(classnames)], as :func:`clipfast.build_zero_shot_classifier` does.

        Raises:
            ValueError: there are no classes or no templates.
        """
        features = self.texts(prompts_of(classnames, templates), store, world)
        if not world.is_main:
            return torch.empty(0)
        return F.normalize(features.unflatten(0, (len(classnames), len(templates))).mean(1), dim=-1).T


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A transform that applies ``change`` (such as a synthetic shift) to a PIL image, and then ``transform``."""

    change: Change
    transform: Callable[..., Tensor]

    def __call__(self, image: "Image.Image") -> Tensor:
        """Change the image, and return the transform of the result."""
        return self.transform(self.change(image))

    @property
    def patch_size(self) -> int | None:
        """The patch size of a transform for NaFlex models; None for others."""
        return getattr(self.transform, "patch_size", None)


class PreparedEncoder(Encoder):
    """An encoder that changes images, for example by a synthetic shift, before it encodes them by another encoder."""

    @classmethod
    def of(cls, encoder: Encoder, change: Change) -> "PreparedEncoder":
        """Return an encoder with the model of ``encoder`` that changes images before its transform.

        Args:
            encoder: the encoder that holds the model.
            change: a function of PIL images; if features are stored, its ``repr`` must contain everything it depends
                on.
        """
        fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(Encoder)}
        prepared = cls(**{**fields, "transform": Prepared(change, encoder.transform)})
        prepared._of, prepared._change = encoder, change
        return prepared

    _of: Encoder
    _change: Change

    def images(self, pixels: Tensor | PackedImages) -> Tensor:
        """Return the features of images that were changed by the transform, by the encoder given to :meth:`of`."""
        return self._of.images(pixels)

    def about(self) -> dict[str, Any]:
        """Return the names and the digest of the model, and the change of images, which identify stored features."""
        return {**self._of.about(), "change": repr(self._change)}


SIDE = 16  # the width and height of the thumbnails whose pixels are compared


def small_pixels(image: "Image.Image") -> Tensor:
    """Return a thumbnail of an image for :class:`PixelEncoder`, uint8 [3, 16, 16]."""
    import numpy as np
    from PIL import Image

    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).movedim(-1, 0).contiguous()


class PixelEncoder(Encoder):
    """An encoder without a model: the similarity of two images is the correlation of their thumbnails' pixels.

    It finds copies of an image, where a model finds images of similar content. It has no features of texts.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__("pixels", None, None, small_pixels, device)

    def about(self) -> dict[str, Any]:
        """Return plain values that identify stored features of thumbnails."""
        return {"model": self.name, "side": SIDE}

    def images(self, pixels: Tensor | PackedImages) -> Tensor:
        """Return the pixels of thumbnails [B, 3, 16, 16] as features [B, 768] of mean 0 and unit length."""
        assert isinstance(pixels, Tensor)
        flat = pixels.to(self.device).float().flatten(1)
        return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
