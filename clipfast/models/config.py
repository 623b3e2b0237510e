"""Model configurations, with OpenCLIP's names; its JSON files can be read."""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

QUICK_GELU_SUFFIX = "-quickgelu"


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
        """Refuse sizes that are not positive, and a patch_dropout that is not in [0, 1) or that belongs to a ResNet.

        Raises:
            ValueError: as above.
        """
        is_vit = isinstance(self.layers, int)
        _check_sizes("vision_cfg", self, ("image_size", "width", "head_width", "mlp_ratio", *("layers",) * is_vit))
        if is_vit:
            _check_sizes("vision_cfg", self, ("patch_size",))
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout must be at least 0 and less than 1, got {self.patch_dropout}")
        if self.patch_dropout and not isinstance(self.layers, int):
            raise ValueError(f"patch_dropout is for vision transformers, since a ResNet has no patches; got {self}")

    @property
    def heads(self) -> int:
        """The number of attention heads of the transformer, or of the ResNet's attention pooling."""
        return (self.width if isinstance(self.layers, int) else self.width * 32) // self.head_width


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Settings of the text tower: a causal transformer that is read at the end-of-text token."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        """Refuse sizes that are not positive.

        Raises:
            ValueError: as above.
        """
        _check_sizes("text_cfg", self, [field.name for field in dataclasses.fields(self)])


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

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CLIPConfig":
        """Read OpenCLIP's layout: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, optionally, ``quick_gelu``.

        Raises:
            ValueError: if a key is missing, or is one that this package does not implement; to ignore it would build
                another model.
        """
        unknown = set(raw) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
        if unknown or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(raw):
            raise ValueError(
                f"model config needs embed_dim, vision_cfg and text_cfg, and may have quick_gelu; got {sorted(raw)}"
            )
        vision = _fields(VisionConfig, "vision_cfg", raw["vision_cfg"])
        if isinstance(vision.get("layers"), list):
            vision["layers"] = tuple(vision["layers"])
        text = _fields(TextConfig, "text_cfg", raw["text_cfg"])
        return cls(raw["embed_dim"], VisionConfig(**vision), TextConfig(**text), raw.get("quick_gelu", False))

    def with_vision(self, **changes: Any) -> "CLIPConfig":
        """Return a copy with other settings of the image tower; a setting that is None stays as it is."""
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, **changes))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in OpenCLIP's layout, which either package loads."""
        raw: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "vision_cfg": dataclasses.asdict(self.vision),
            "text_cfg": dataclasses.asdict(self.text),
        }
        if not self.vision.patch_dropout:
            del raw["vision_cfg"]["patch_dropout"]
        if not isinstance(self.vision.layers, int):
            raw["vision_cfg"]["layers"] = list(self.vision.layers)
        return raw | ({"quick_gelu": True} if self.quick_gelu else {})


def _check_sizes(section: str, config: object, names: Iterable[str]) -> None:
    """Refuse sizes that are not positive numbers: whole ones, but for mlp_ratio."""
    for name in names:
        value, kind = getattr(config, name), "number" if name == "mlp_ratio" else "whole number"
        right = isinstance(value, int | float if name == "mlp_ratio" else int) and not isinstance(value, bool)
        if not right or not 0 < value < math.inf:
            raise ValueError(f"{section}: {name} must be a positive {kind}, got {value!r}")


def _fields(kind: type[VisionConfig] | type[TextConfig], section: str, raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = {key: value for key, value in raw.items() if key not in names}
    if unknown:
        raise ValueError(f"{section} has settings that clipfast does not implement: {unknown}")
    return dict(raw)


def _vit(embed_dim: int, vision: VisionConfig, text_width: int = 512, text_layers: int = 12) -> CLIPConfig:
    return CLIPConfig(embed_dim, vision, TextConfig(width=text_width, heads=text_width // 64, layers=text_layers))


def _resnet(
    embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text_width: int
) -> CLIPConfig:
    vision = VisionConfig(image_size, layers, width, patch_size=None)
    return CLIPConfig(embed_dim, vision, TextConfig(width=text_width, heads=text_width // 64))


_CONFIGS = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B-32": _vit(512, VisionConfig(patch_size=32)),
    "ViT-B-16": _vit(512, VisionConfig(patch_size=16)),
    "ViT-L-14": _vit(768, VisionConfig(layers=24, width=1024, patch_size=14), 768),
    "ViT-L-14-336": _vit(768, VisionConfig(336, 24, 1024, patch_size=14), 768),
    "ViT-H-14": _vit(1024, VisionConfig(224, 32, 1280, 80, patch_size=14), 1024, 24),
    "ViT-g-14": _vit(1024, VisionConfig(224, 40, 1408, 88, 4.3637, 14), 1024, 24),
    "ViT-bigG-14": _vit(1280, VisionConfig(224, 48, 1664, 104, 4.9231, 14), 1280, 32),
    # The model of the emoji recipe, small enough to be trained on a CPU.
    "ViT-T-8-32": CLIPConfig(128, VisionConfig(32, 4, 128, 32, patch_size=8), TextConfig(width=128, heads=4, layers=2)),
}
_CONFIGS |= {
    name + QUICK_GELU_SUFFIX: dataclasses.replace(config, quick_gelu=True) for name, config in _CONFIGS.items()
}


def list_models() -> list[str]:
    """Return the names that :func:`clipfast.create_model` takes."""
    return list(_CONFIGS)


def add_model_config(path: str | Path) -> None:
    """Register the configuration in OpenCLIP's JSON file ``path`` under the file's stem.

    Raises:
        ValueError: if it is not such a file, or this package cannot build the model.
    """
    _CONFIGS[Path(path).stem] = read_model_config(path)


def read_model_config(path: str | Path) -> CLIPConfig:
    """Return the configuration in OpenCLIP's JSON file ``path``.

    Raises:
        ValueError: if it is not such a file, or this package cannot build the model.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a model configuration: {error}") from error
    return CLIPConfig.from_dict(raw)


def get_model_config(name: str) -> CLIPConfig:
    """Return the configuration of a model.

    Raises:
        ValueError: if the name is unknown; the message lists the known ones.
    """
    if name not in _CONFIGS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_CONFIGS)}")
    return _CONFIGS[name]
