"""A model that encodes images and texts for evaluations: one of clipfast, or of any package with the same methods."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adopt import apply_to_open_clip
from ..factory import create_model, get_tokenizer, transform_of
from ..progress import each
from ..sources import resolve_source
from ..training.world import ALONE, World
from .store import FeatureStore
from .zero_shot import TEXTS, Template, encode_texts, prompts_of

OPEN_CLIP_PREFIX = "open_clip:"
PROBES = ("a photo of a cat.", "Größe: 10 000 × 3, naïve 猫 &amp; Co.", "word " * 100)


@dataclasses.dataclass
class Encoder:
    """A model with what prepares its images and texts.

    Attributes:
        name: of the model, for people.
        model: in evaluation mode; ``encode_image`` and ``encode_text`` take ``normalize=True``.
        tokenizer: turns a list of texts into ids.
        transform: turns a PIL image into a tensor [3, H, W].
        device: of the model.
        pretrained: the name of its weights, for people.
    """

    name: str
    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    transform: Callable[..., Tensor]
    device: str | torch.device = "cpu"
    pretrained: str | None = None

    @classmethod
    def load(
        cls, name: str, pretrained: str | None = None, *, device: str, tokenizer_file: str | None = None,
        cache_dir: str | Path | None = None, backend: str = "auto",
    ) -> "Encoder":  # fmt: skip
        """Build a model with its weights; arguments are those of :func:`clipfast.create_model` and ``get_tokenizer``.

        ``open_clip:NAME`` is what OpenCLIP builds by that name, on the kernels of this package.

        Raises:
            ValueError: the model has no weights, or there is no such model.
        """
        if name.startswith(OPEN_CLIP_PREFIX):
            return cls._of_open_clip(name, pretrained, device, cache_dir)
        source = dataclasses.replace(resolve_source(name, pretrained, cache_dir=cache_dir), name=name)
        model = create_model(source, require_pretrained=True, device=device, backend=backend).eval()
        tokenizer = get_tokenizer(source, tokenizer_file=tokenizer_file)
        return cls(name, model, tokenizer, transform_of(model, uint8=True), device, pretrained)

    @classmethod
    def _of_open_clip(cls, name: str, pretrained: str | None, device: str, cache_dir: str | Path | None) -> "Encoder":
        """Build a model of OpenCLIP, and let it run on the kernels of this package.

        Raises:
            ValueError: OpenCLIP is not installed, or the model has no weights.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ValueError(f"--model {name} needs OpenCLIP: pip install open-clip-torch") from error
        theirs = name.removeprefix(OPEN_CLIP_PREFIX)
        if not pretrained and ":" not in theirs:
            raise ValueError(
                f"{name} has no weights of its own: give a tag of OpenCLIP's or a checkpoint to --pretrained"
            )
        folder = None if cache_dir is None else str(cache_dir)
        model, _, transform = open_clip.create_model_and_transforms(theirs, pretrained, device=device, cache_dir=folder)
        apply_to_open_clip(model)
        return cls(name, model.eval(), open_clip.get_tokenizer(theirs), transform, device, pretrained)

    @functools.cached_property
    def blank(self) -> Tensor:
        """The input [3, H, W] for an image without content, which has the size and the dtype of any other."""
        from PIL import Image

        return self.transform(Image.new("RGB", (1, 1)))

    @functools.cached_property
    def digest(self) -> str:
        """A SHA-256 of everything that the features depend on but the input: weights, architecture, preparation."""
        model = self.model
        found = hashlib.sha256(repr(model.config if hasattr(model, "config") else model).encode())
        found.update(re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform)).encode())
        found.update(repr(self.tokenizer(list(PROBES)).tolist()).encode())  # stands for the whole tokenizer
        for name, value in model.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return what features by this model depend on, as plain values, and its name."""
        return {"model": self.name, "pretrained": self.pretrained, "digest": self.digest}

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Return the features [B, D], of unit length, of images [B, 3, H, W]."""
        features: Tensor = self.model.encode_image(pixels.to(self.device), normalize=True)
        return features

    @torch.no_grad()
    def texts(self, texts: Sequence[str], store: FeatureStore | None = None, world: World = ALONE) -> Tensor:
        """Return the features [N, D], of unit length, of texts, which need not be distinct, on rank 0.

        Several ranks share the work; all of them must call this method.

        Args:
            texts: on rank 0; others need not know them.
            store: keeps the features, or None.
            world: the ranks. Other ranks get no features.
        """
        distinct = world.on_main(lambda: list(dict.fromkeys(texts)))
        content = hashlib.sha256(json.dumps(distinct).encode()).hexdigest()[:32]
        section = None if store is None else world.on_main(lambda: store.section("texts", self.about()))
        if section is None or not world.on_main(lambda: section.holds(content)):
            batches = [distinct[start : start + TEXTS] for start in range(0, len(distinct), TEXTS)]
            mine = each(batches[world.rank :: world.size], "texts", "batches", shown=world.is_main)
            found = [encode_texts(self.model, self.tokenizer, batch, self.device).cpu() for batch in mine]
            world.meet()  # parts take different times
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
            return features.to(self.device)  # which may fill half of the memory: without a copy
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


class UnnormalizedEncoder(Encoder):
    """An encoder whose features of images keep their lengths."""

    @classmethod
    def of(cls, encoder: Encoder) -> "UnnormalizedEncoder":
        """Return the encoder with the model of another one."""
        return cls(**{field.name: getattr(encoder, field.name) for field in dataclasses.fields(Encoder)})

    def about(self) -> dict[str, Any]:
        """Return what features by this model depend on, as plain values, and its name."""
        return {**super().about(), "normalized": False}

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Return the features [B, D] of images [B, 3, H, W]."""
        features: Tensor = self.model.encode_image(pixels.to(self.device), normalize=False)
        return features
