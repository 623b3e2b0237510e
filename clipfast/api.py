"""The public names of clipfast, as type checkers see them: ``clipfast.X`` is ``clipfast.api.X``."""

from . import kernels
from .adopt import apply_to_hf, apply_to_open_clip, apply_to_timm, hf_collator, revert_model
from .adopt.routes import report_kernels
from .checkpoints.checkpoint import CheckpointError, load_checkpoint
from .checkpoints.convert import convert_checkpoint
from .checkpoints.inspection import CheckpointInfo, inspect_checkpoint
from .checkpoints.open_clip_folder import export_open_clip
from .checkpoints.pretrained import (
    get_pretrained_cfg,
    list_pretrained,
    list_pretrained_models_by_tag,
    list_pretrained_tags_by_model,
)
from .evaluate.retrieval import recall_at
from .evaluate.zero_shot import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
    build_zero_shot_classifier,
)
from .factory import create_model, create_model_and_transforms, create_model_from_pretrained, get_tokenizer
from .kernels import (
    Fp8Rows,
    attention,
    attention_pool,
    attention_qkv,
    bias_gelu,
    bias_gelu_fp8,
    bias_quick_gelu,
    bias_quick_gelu_fp8,
    contrastive_loss,
    fp8_linear,
    info_nce_loss,
    layer_norm,
    layer_norm_fp8,
    nt_xent_loss,
    patch_embed,
    patch_embed_packed,
    quantize_rows,
    quantize_weight,
    retrieval_ranks,
    sigmoid_loss,
    text_embed,
    top_k,
)
from .losses.accumulation import accumulate_gradients, largest_micro_batch
from .losses.clip_loss import ClipLoss
from .losses.coca_loss import CoCaLoss
from .losses.distill_loss import DistillClipLoss
from .losses.siglip_loss import SigLipLoss
from .models import CLIP, SigLIP, add_model_config, dense_features, get_model_config, list_models
from .models.aug_cfg import image_transform
from .models.file_tokenizer import FileTokenizer
from .models.images import ImageError, open_image
from .models.packed_text import PackedText, pack_texts
from .models.tokenizer import Tokenizer, tokenize
from .search.embeddings import Embeddings
from .train.graphs import graphed

__all__ = [
    "CLIP",
    "IMAGENET_CLASSNAMES",
    "OPENAI_IMAGENET_TEMPLATES",
    "SIMPLE_IMAGENET_TEMPLATES",
    "CheckpointError",
    "CheckpointInfo",
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "Embeddings",
    "FileTokenizer",
    "Fp8Rows",
    "ImageError",
    "PackedText",
    "SigLIP",
    "SigLipLoss",
    "Tokenizer",
    "accumulate_gradients",
    "add_model_config",
    "apply_to_hf",
    "apply_to_open_clip",
    "apply_to_timm",
    "attention",
    "attention_pool",
    "attention_qkv",
    "bias_gelu",
    "bias_gelu_fp8",
    "bias_quick_gelu",
    "bias_quick_gelu_fp8",
    "build_zero_shot_classifier",
    "contrastive_loss",
    "convert_checkpoint",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "dense_features",
    "export_open_clip",
    "fp8_linear",
    "get_model_config",
    "get_pretrained_cfg",
    "get_tokenizer",
    "graphed",
    "hf_collator",
    "image_transform",
    "info_nce_loss",
    "inspect_checkpoint",
    "kernels",
    "largest_micro_batch",
    "layer_norm",
    "layer_norm_fp8",
    "list_models",
    "list_pretrained",
    "list_pretrained_models_by_tag",
    "list_pretrained_tags_by_model",
    "load_checkpoint",
    "nt_xent_loss",
    "open_image",
    "pack_texts",
    "patch_embed",
    "patch_embed_packed",
    "quantize_rows",
    "quantize_weight",
    "recall_at",
    "report_kernels",
    "retrieval_ranks",
    "revert_model",
    "sigmoid_loss",
    "text_embed",
    "tokenize",
    "top_k",
]  # fmt: skip
