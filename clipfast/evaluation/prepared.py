"""An encoder whose images are changed before the model's own preparation of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .encoder import Encoder

if TYPE_CHECKING:
    from PIL import Image

Change = Callable[["Image.Image"], "Image.Image"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A change of PIL images, and the transform that follows it."""

    change: Change
    transform: Callable[..., Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the changed image as the transform makes it."""
        return self.transform(self.change(image))


class PreparedEncoder(Encoder):
    """An encoder that leaves the encoding to another one."""

    @classmethod
    def of(cls, encoder: Encoder, change: Change) -> PreparedEncoder:
        """Return the encoder with a change before its transform.

        Args:
            encoder: has the model.
            change: of images; its ``repr`` must say everything that it depends on.
        """
        fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(Encoder)}
        prepared = cls(**{**fields, "transform": Prepared(change, encoder.transform)})
        prepared._of, prepared._change = encoder, change
        return prepared

    _of: Encoder
    _change: Change

    def images(self, pixels: Tensor) -> Tensor:
        """Return the features of images as the other encoder does."""
        return self._of.images(pixels)

    def about(self) -> dict[str, Any]:
        """Return what features by this model depend on, as plain values, and its name."""
        return {**self._of.about(), "change": repr(self._change)}
