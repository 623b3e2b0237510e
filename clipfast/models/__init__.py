"""CLIP and SigLIP models whose towers call the kernels, with the parameter names of the published checkpoints."""

from .clip import CLIP, CLIPOutput
from .dense import dense_features
from .model_config import CLIPConfig, TextConfig, VisionConfig
from .naflex import NaFlexCLIP, NaFlexSigLIP
from .naflex_config import NaFlexConfig
from .packed_images import PackedImages, pack_images, unpad_images
from .registry import add_model_config, get_model_config, list_models
from .siglip import SigLIP, SigLIPOutput
from .siglip_config import SigLIPConfig
from .vision import interpolate_positions

__all__ = [
    "CLIP", "CLIPConfig", "CLIPOutput", "NaFlexCLIP", "NaFlexConfig", "NaFlexSigLIP", "PackedImages", "SigLIP",
    "SigLIPConfig", "SigLIPOutput", "TextConfig", "VisionConfig", "add_model_config", "build", "dense_features",
    "get_model_config", "interpolate_positions", "list_models", "pack_images", "unpad_images",
]  # fmt: skip


def build(config: CLIPConfig, *, output_dict: bool = False) -> CLIP:
    """Build a model with random weights: a :class:`SigLIP` from a :class:`SigLIPConfig`, otherwise a :class:`CLIP`."""
    kinds = (NaFlexCLIP, NaFlexSigLIP) if isinstance(config.vision, NaFlexConfig) else (CLIP, SigLIP)
    kind: type[CLIP] = kinds[isinstance(config, SigLIPConfig)]
    return kind(config, output_dict=output_dict)
