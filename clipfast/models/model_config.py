"""The configuration of a CLIP model, with OpenCLIP's names of settings."""

import dataclasses
from collections.abc import Iterable
from typing import Any

# Limits of the number of layers and of other sizes. A configuration may come from an untrusted file, and one beyond the
# limits is refused.
MAX_LAYERS, MAX_SIZE = 1000, 1 << 24


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Settings of the image tower: a vision transformer if ``layers`` is a number, a ResNet if it is four numbers.

    In training, a vision transformer drops the share ``patch_dropout`` of each image's patches.
    """

    image_size: int = 224
    layers: int | tuple[int, int, int, int] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | None = 16
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes that no model has, and a patch_dropout that is not in [0, 1) or that belongs to a ResNet.

        Raises:
            ValueError: as above.
        """
        is_vit = not isinstance(self.layers, tuple)
        _check_sizes("vision_cfg", self, ("image_size", "width", "head_width", "mlp_ratio", *("patch_size",) * is_vit))
        stages = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        for count in stages:
            _check_size("vision_cfg", "layers", count, MAX_LAYERS)
        if not is_vit and len(stages) != 4:
            raise ValueError(f"vision_cfg: layers of a ResNet are four numbers, got {self.layers!r:.80}")
        if self.heads < 1 or self.channels % self.heads:
            raise ValueError(
                f"vision_cfg: the {self.channels} channels of attention must be a multiple of its heads, but a "
                f"head_width of {self.head_width} makes {self.heads} of them"
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout must be at least 0 and less than 1, got {self.patch_dropout}")
        if self.patch_dropout and not isinstance(self.layers, int):
            raise ValueError(f"patch_dropout is for vision transformers, since a ResNet has no patches; got {self}")

    @property
    def channels(self) -> int:
        """The width of the image transformer, or of the ResNet's attention pooling."""
        return self.width if isinstance(self.layers, int) else self.width * 32

    @property
    def heads(self) -> int:
        """The number of attention heads of the image transformer, or of the ResNet's attention pooling."""
        return self.channels // self.head_width

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the image tower in OpenCLIP's layout."""
        raw = dataclasses.asdict(self)
        if not self.patch_dropout:
            del raw["patch_dropout"]
        if not isinstance(self.layers, int):
            raw["layers"] = list(self.layers)
        return raw


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Settings of the text tower: a causal transformer whose output at the end-of-text token is the feature."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        """Refuse sizes of a text tower that no model has.

        Raises:
            ValueError: as above.
        """
        _check_sizes("text_cfg", self, ("context_length", "vocab_size", "width", "heads", "mlp_ratio"))
        _check_size("text_cfg", "layers", self.layers, MAX_LAYERS)
        if self.width % self.heads:
            raise ValueError(f"text_cfg: width must be a multiple of heads, got {self.width} and {self.heads}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Settings of a model: both towers, the dimension of the embedding, and GELU or (as OpenAI trained) QuickGELU."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        """Refuse an embed_dim that is not positive.

        Raises:
            ValueError: as above.
        """
        _check_sizes("model config", self, ("embed_dim",))

    @property
    def least_parameters(self) -> int:
        """A lower bound of the model's number of parameters, near that number, computed from the settings alone."""
        vision, text = self.vision, self.text
        count = text.layers * (4 + 2 * text.mlp_ratio) * text.width**2
        count += (text.vocab_size + text.context_length + self.embed_dim) * text.width
        if isinstance(vision.layers, tuple):
            count += sum(17 * 4**stage * number for stage, number in enumerate(vision.layers)) * vision.width**2
            return int(count + (vision.image_size // 32) ** 2 * vision.channels)
        patch = vision.patch_size or 1
        count += vision.layers * (4 + 2 * vision.mlp_ratio) * vision.width**2
        return int(count + (3 * patch**2 + (vision.image_size // patch) ** 2) * vision.width)

    @property
    def activation(self) -> str:
        """The name of the model's activation in messages: "GELU" or "QuickGELU"."""
        return "QuickGELU" if self.quick_gelu else "GELU"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CLIPConfig":
        """Read OpenCLIP's layout: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, optionally, ``quick_gelu``.

        ``custom_text`` is accepted as well: it changes the names of weights, but not the computation. A model with a
        SigLIP tower of timm becomes a :class:`~clipfast.models.siglip_config.SigLIPConfig`.

        Raises:
            ValueError: a key is missing, or is one that this package does not implement. Ignoring it would build
                another model.
        """
        from .siglip_config import SigLIPConfig, is_siglip  # not at the top, since siglip_config imports this module

        if not isinstance(raw, dict):
            raise ValueError(f"model config must be an object of settings, got {raw!r:.80}")
        if is_siglip(raw):
            return SigLIPConfig.from_dict(raw)
        unknown = set(raw) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
        if unknown or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(raw):
            raise ValueError(
                f"model config needs embed_dim, vision_cfg and text_cfg, and may have quick_gelu; got {sorted(raw)}"
            )
        text = TextConfig(**_fields(TextConfig, "text_cfg", raw["text_cfg"]))
        return cls(raw["embed_dim"], _vision(raw["vision_cfg"]), text, raw.get("quick_gelu", False))

    def with_vision(self, **changes: Any) -> "CLIPConfig":
        """Return a copy of the configuration with other settings of the image tower; None leaves a setting as it is."""
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, **changes))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in OpenCLIP's layout, which OpenCLIP and clipfast load."""
        raw: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "vision_cfg": self.vision.to_dict(),
            "text_cfg": dataclasses.asdict(self.text),
        }
        return raw | ({"quick_gelu": True} if self.quick_gelu else {})


def _vision(raw: Any) -> VisionConfig:
    """Return the settings of the image tower in a model's configuration."""
    from .naflex_config import is_naflex, read_naflex  # not at the top, since naflex_config imports this module

    if is_naflex(raw):
        return read_naflex(raw)
    vision = _fields(VisionConfig, "vision_cfg", raw)
    if isinstance(vision.get("layers"), list):
        vision["layers"] = tuple(vision["layers"])
    return VisionConfig(**vision)


def _check_sizes(section: str, config: object, names: Iterable[str]) -> None:
    """Refuse a section of a model's configuration in which one of the sizes ``names`` is unusable."""
    for name in names:
        _check_size(section, name, getattr(config, name))


def _check_size(section: str, name: str, value: object, limit: int = MAX_SIZE) -> None:
    """Refuse a size of a model that is not a positive number up to a limit; all but mlp_ratio must be integers."""
    kind = "number" if name == "mlp_ratio" else "whole number"
    right = isinstance(value, int | float if name == "mlp_ratio" else int) and not isinstance(value, bool)
    if not right or not value > 0:  # type: ignore[operator]
        raise ValueError(f"{section}: {name} must be a positive {kind}, got {value!r:.80}")
    if value > limit:  # type: ignore[operator]
        raise ValueError(f"{section}: {name} must be at most {limit:,}, got {value!r:.80}")


def _fields(kind: type[VisionConfig] | type[TextConfig], section: str, raw: Any) -> dict[str, Any]:
    """Return the settings of a tower in a model's configuration; refuse unknown ones."""
    if not isinstance(raw, dict):
        raise ValueError(f"{section} must be an object of settings, got {raw!r:.80}")
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = {key: value for key, value in raw.items() if key not in names}
    if unknown:
        raise ValueError(f"{section} has settings that clipfast does not implement: {unknown}")
    return dict(raw)
