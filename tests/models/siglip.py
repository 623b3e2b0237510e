"""Helpers for tests of SigLIP: small models, the same models in OpenCLIP and timm, and tokenizers of a few words."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast.models import SigLIP, SigLIPConfig, TextConfig, VisionConfig

TEXT = TextConfig(12, 300, 48, 2, 2, 2.75)
# Models with each activation, with both, without a projection of texts, and with edge pixels that fill no patch.
CONFIGS = {
    "exact": SigLIPConfig(64, VisionConfig(32, 2, 64, 32, 3.6875, 8), TEXT),
    "tanh": SigLIPConfig(64, VisionConfig(30, 2, 64, 32, 4.0, 8), TEXT, image_gelu="tanh", text_gelu="tanh"),
    "mixed": SigLIPConfig(64, VisionConfig(40, 3, 64, 16, 2.5, 8), TEXT, text_gelu="tanh", tokenizer="some/repo"),
    "bare": SigLIPConfig(48, VisionConfig(24, 1, 48, 24, 2.0, 8), TEXT, text_proj=False, clean="lower"),
}
TEXT_FOR_TOKENIZERS = (
    "a photo of the red green blue yellow black white purple orange thing cat dog drawing no with and two on it's "
    "house tree sky very long short 0 1 2 3 ?! . , état über 猫 😀"
)


def make_model(config: SigLIPConfig) -> SigLIP:
    """Return a SigLIP model in evaluation mode whose every tensor is random."""
    model = SigLIP(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "logit" not in name:
                value.add_(torch.randn_like(value) * 0.05)
    return model


@contextlib.contextmanager
def known_to_timm(*configs: SigLIPConfig) -> Iterator[None]:
    """Let timm, and so OpenCLIP, build the image towers of ``configs`` by their names."""
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    create, known = timm.create_model, {config.timm_model_name: config for config in configs}

    def create_model(name, num_classes=1000, global_pool="map", pretrained=False, **options):
        """Build timm's image tower for a SigLIP configuration that only the test knows."""
        if name not in known:
            return create(name, num_classes=num_classes, global_pool=global_pool, pretrained=pretrained, **options)
        vision, is_tanh = known[name].vision, known[name].image_gelu == "tanh"
        return VisionTransformer(
            img_size=vision.image_size, patch_size=vision.patch_size, embed_dim=vision.width, depth=vision.layers,
            num_heads=vision.heads, mlp_ratio=vision.mlp_ratio, class_token=False, global_pool=global_pool,
            num_classes=num_classes, act_layer="gelu_tanh" if is_tanh else None, **options,
        )  # fmt: skip

    with mock.patch.object(timm, "create_model", create_model):
        yield


def open_clip_model(config: SigLIPConfig) -> torch.nn.Module:
    """Return OpenCLIP's own model of a SigLIP ``config``, in evaluation mode."""
    open_clip = pytest.importorskip("open_clip")
    raw = config.to_dict()
    raw.pop("custom_text")
    with known_to_timm(config):
        return open_clip.CustomTextCLIP(**raw).eval()


def inputs(config: SigLIPConfig, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return normalised images and token ids for a SigLIP model."""
    side, text = config.vision.image_size, config.text
    images = torch.randn(batch, 3, side, side, dtype=dtype)
    return images, torch.randint(0, text.vocab_size, (batch, text.context_length))


def save_tokenizer(folder: Path, kind: str = "t5", vocab_size: int = 200) -> Path:
    """Train a tokenizer like SigLIP's and write its files: "t5" pads with the end of text (id 1), "gemma" with id 0."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "</s>", "<unk>"]
    if kind == "t5":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=special, unk_token="<unk>")
    else:
        special = ["<pad>", "<eos>", "<bos>", "<unk>"]
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    words = TEXT_FOR_TOKENIZERS.split()
    tokenizer.train_from_iterator([" ".join(words[i:] + words[:i]) for i in range(len(words))], trainer)
    end = special[1]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad = "</s>" if kind == "t5" else "<pad>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": end, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
