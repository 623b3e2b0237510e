"""clipfast: the performance engine for CLIP.

Triton kernels (``clipfast.kernels``) under a thin model layer with OpenCLIP's names, checked against PyTorch
references. A public name is imported when it is first asked for, with the module that defines it: importing clipfast
needs neither PyTorch nor Triton, and ``contrastive_loss`` needs nothing but the kernels.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# In a checkout kernels/ lies beside clipfast/. Only an installation makes it the package clipfast.kernels.
if find_spec(f"{__name__}.kernels") is None:
    raise ImportError("clipfast is not installed: run pip install -e . in the checkout")

# This maps each module to the public names that it defines. clipfast/api.py lists them once more, for type checkers.
_NAMES = {
    "losses.accumulation": ("accumulate_gradients", "largest_micro_batch"),
    "adopt": ("apply_to_hf", "apply_to_open_clip", "apply_to_timm", "hf_collator", "revert_model"),
    "models.aug_cfg": ("image_transform",),
    "checkpoints.checkpoint": ("CheckpointError", "load_checkpoint"),
    "losses.coca_loss": ("CoCaLoss",),
    "checkpoints.convert": ("convert_checkpoint",),
    "checkpoints.inspection": ("CheckpointInfo", "inspect_checkpoint"),
    "losses.distill_loss": ("DistillClipLoss",),
    "checkpoints.open_clip_folder": ("export_open_clip",),
    "evaluate.retrieval": ("recall_at",),
    "evaluate.zero_shot": (
        "IMAGENET_CLASSNAMES", "OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES", "build_zero_shot_classifier",
    ),
    "factory": ("create_model", "create_model_and_transforms", "create_model_from_pretrained", "get_tokenizer"),
    "models.file_tokenizer": ("FileTokenizer",),
    "models.images": ("ImageError", "open_image"),
    "kernels": (
        "Fp8Rows", "attention", "attention_pool", "attention_qkv", "bias_gelu", "bias_gelu_fp8", "bias_quick_gelu",
        "bias_quick_gelu_fp8", "contrastive_loss", "fp8_linear", "info_nce_loss", "layer_norm", "layer_norm_fp8",
        "nt_xent_loss", "patch_embed", "patch_embed_packed", "quantize_rows", "quantize_weight", "retrieval_ranks",
        "sigmoid_loss", "text_embed", "top_k",
    ),
    "losses.clip_loss": ("ClipLoss",),
    "models": ("CLIP", "SigLIP", "add_model_config", "dense_features", "get_model_config", "list_models"),
    "checkpoints.pretrained": (
        "get_pretrained_cfg", "list_pretrained", "list_pretrained_models_by_tag", "list_pretrained_tags_by_model",
    ),
    "adopt.routes": ("report_kernels",),
    "search.embeddings": ("Embeddings",),
    "train.graphs": ("graphed",),
    "losses.siglip_loss": ("SigLipLoss",),
    "models.packed_text": ("PackedText", "pack_texts"),
    "models.tokenizer": ("Tokenizer", "tokenize"),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
# This maps names of version 0.1, which still work, to the present names.
_RENAMED = {"convert": "convert_checkpoint", "report": "report_kernels", "revert": "revert_model"}

if TYPE_CHECKING:
    from .api import *  # noqa: F403
else:
    __all__ = sorted([*_MODULES, "kernels"])

    def __getattr__(name):
        """Import a public name of clipfast when it is first used (PEP 562), and return its object."""
        if name in _RENAMED:
            new = _RENAMED[name]
            warnings.warn(
                f"clipfast.{name} is now clipfast.{new}; version 0.3 removes the old name", DeprecationWarning, 2
            )
            return __getattr__(new)
        if name not in _MODULES:
            # The name may be a package inside clipfast, such as clipfast.models.
            if not name.startswith("__") and find_spec(f"{__name__}.{name}"):
                return import_module(f".{name}", __name__)
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = found
        return found

    def __dir__():
        """Return the public names of clipfast, imported or not, and all other names that the module has."""
        return sorted({*globals(), *__all__})
