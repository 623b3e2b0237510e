"""The CLIP layer: towers that call the kernels, in the layout of the published checkpoints."""

from .clip import CLIP, CLIPOutput
from .config import CLIPConfig, TextConfig, VisionConfig, add_model_config, get_model_config, list_models
from .vision import interpolate_positions

__all__ = [
    "CLIP", "CLIPConfig", "CLIPOutput", "TextConfig", "VisionConfig", "add_model_config", "get_model_config",
    "interpolate_positions", "list_models",
]  # fmt: skip
