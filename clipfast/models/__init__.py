"""CLIP and SigLIP models whose towers call the kernels, with the parameter names of the published checkpoints."""

from .clip import CLIP, CLIPOutput
from .dense import dense_features
from .model_config import CLIPConfig, TextConfig, VisionConfig
from .registry import add_model_config, get_model_config, list_models
from .siglip import SigLIP, SigLIPOutput
from .siglip_config import SigLIPConfig
from .vision import interpolate_positions

__all__ = [
    "CLIP", "CLIPConfig", "CLIPOutput", "SigLIP", "SigLIPConfig", "SigLIPOutput", "TextConfig", "VisionConfig",
    "add_model_config", "build", "dense_features", "get_model_config", "interpolate_positions", "list_models",
]  # fmt: skip


def build(config: CLIPConfig, *, output_dict: bool = False) -> CLIP:
    """Build a model with random weights: a :class:`SigLIP` from a :class:`SigLIPConfig`, otherwise a :class:`CLIP`."""
    if isinstance(config, SigLIPConfig):
        return SigLIP(config, output_dict=output_dict)
    return CLIP(config, output_dict=output_dict)
