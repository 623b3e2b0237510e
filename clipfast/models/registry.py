"""The registry of models: configurations of OpenCLIP's models by name, and configurations from JSON files."""

import dataclasses
from pathlib import Path

from ..io.files import read_json
from ..io.text import meant
from .model_config import CLIPConfig, TextConfig, VisionConfig
from .naflex_config import TIMM
from .siglip_config import PUBLISHED, naflex_config, published_config

QUICK_GELU_SUFFIX = "-quickgelu"


def _vit(embed_dim: int, vision: VisionConfig, text_width: int = 512, text_layers: int = 12) -> CLIPConfig:
    """Return the configuration of a model with a vision transformer."""
    return CLIPConfig(embed_dim, vision, TextConfig(width=text_width, heads=text_width // 64, layers=text_layers))


def _resnet(
    embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text_width: int
) -> CLIPConfig:
    """Return the configuration of a model with a ResNet."""
    vision = VisionConfig(image_size, layers, width, patch_size=None)
    return CLIPConfig(embed_dim, vision, TextConfig(width=text_width, heads=text_width // 64))


_CONFIGS = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-S-32": _vit(384, VisionConfig(width=384, patch_size=32), 384),
    "ViT-S-16": _vit(384, VisionConfig(width=384), 384),
    "ViT-S-32-alt": _vit(256, VisionConfig(width=384, patch_size=32), 256, 10),
    "ViT-S-16-alt": _vit(256, VisionConfig(width=384), 256, 10),
    "ViT-M-32": _vit(512, VisionConfig(width=512, patch_size=32)),
    "ViT-M-16": _vit(512, VisionConfig(width=512)),
    "ViT-M-32-alt": _vit(384, VisionConfig(width=512, patch_size=32), 384),
    "ViT-B-32": _vit(512, VisionConfig(patch_size=32)),
    "ViT-B-32-256": _vit(512, VisionConfig(256, patch_size=32)),
    "ViT-B-32-plus-256": _vit(640, VisionConfig(256, width=896, patch_size=32), 640),
    "ViT-B-16": _vit(512, VisionConfig(patch_size=16)),
    "ViT-B-16-plus": _vit(640, VisionConfig(width=896), 640),
    "ViT-B-16-plus-240": _vit(640, VisionConfig(240, width=896), 640),
    "ViT-L-16": _vit(768, VisionConfig(layers=24, width=1024), 768),
    "ViT-L-16-320": _vit(768, VisionConfig(320, 24, 1024), 768),
    "ViT-L-14": _vit(768, VisionConfig(layers=24, width=1024, patch_size=14), 768),
    "ViT-L-14-280": _vit(768, VisionConfig(280, 24, 1024, patch_size=14), 768),
    "ViT-L-14-336": _vit(768, VisionConfig(336, 24, 1024, patch_size=14), 768),
    "ViT-H-16": _vit(1024, VisionConfig(224, 32, 1280, 80), 1024, 24),
    "ViT-H-14": _vit(1024, VisionConfig(224, 32, 1280, 80, patch_size=14), 1024, 24),
    "ViT-H-14-378": _vit(1024, VisionConfig(378, 32, 1280, 80, patch_size=14), 1024, 24),
    "ViT-g-14": _vit(1024, VisionConfig(224, 40, 1408, 88, 4.3637, 14), 1024, 24),
    "ViT-bigG-14": _vit(1280, VisionConfig(224, 48, 1664, 104, 4.9231, 14), 1280, 32),
    "ViT-e-14": _vit(1280, VisionConfig(224, 56, 1792, 112, 8.5715, 14), 1280, 36),
    # The model of the emoji recipe, small enough to be trained on a CPU.
    "ViT-T-8-32": CLIPConfig(128, VisionConfig(32, 4, 128, 32, patch_size=8), TextConfig(width=128, heads=4, layers=2)),
}
_CONFIGS |= {
    name + QUICK_GELU_SUFFIX: dataclasses.replace(config, quick_gelu=True) for name, config in _CONFIGS.items()
}
_CONFIGS |= {name: published_config(name) for name in PUBLISHED}
_GAP = TIMM["naflexvit_base_patch16_gap"]
_CONFIGS |= {
    "ViT-B-16-SigLIP2-naflex": naflex_config("base"),
    "ViT-SO400M-16-SigLIP2-naflex": naflex_config("so400m"),
    "naflex_ViT-B-16": _vit(512, _GAP),
    "naflex_ViT-B-32": _vit(
        512, dataclasses.replace(_GAP, patch_size=32, pos_embed_grid_size=(7, 7), image_seq_len=49)
    ),
}


def list_models() -> list[str]:
    """Return the names that :func:`clipfast.create_model` takes."""
    return list(_CONFIGS)


def add_model_config(path: str | Path) -> None:
    """Register the configuration in OpenCLIP's JSON file ``path`` under the file's stem.

    Raises:
        ValueError: the file is not such a configuration, or clipfast cannot build the model.
    """
    _CONFIGS[Path(path).stem] = read_model_config(path)


def registered(name: str) -> str:
    """Return the name of a model; if ``name`` is the path of a JSON file, register its configuration."""
    if name.endswith(".json"):
        add_model_config(name)
        return Path(name).stem
    return name


def read_model_config(path: str | Path) -> CLIPConfig:
    """Return the configuration in OpenCLIP's JSON file ``path``.

    Raises:
        ValueError: the file is not such a configuration, or clipfast cannot build the model.
    """
    try:
        raw = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a model configuration: {error}") from error
    return CLIPConfig.from_dict(raw)


def get_model_config(name: str) -> CLIPConfig:
    """Return the configuration of a model by its name.

    Raises:
        ValueError: if the name is unknown; the message names similar ones, and says how to use others of OpenCLIP's.
    """
    if name not in _CONFIGS:
        raise ValueError(
            f"unknown model {name!r}{meant(name, _CONFIGS, 3)}. Another model of OpenCLIP's runs on the same kernels: "
            f"build it with open_clip.create_model({name!r}), and hand it to clipfast.apply_to_open_clip. "
            "clipfast.list_models() returns all names"
        )
    return _CONFIGS[name]
