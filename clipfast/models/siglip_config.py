"""The configuration of a SigLIP model. In OpenCLIP's files, only timm's name of the image tower tells its sizes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from .model_config import CLIPConfig, TextConfig, VisionConfig
from .naflex_config import TIMM as NAFLEX
from .naflex_config import NaFlexConfig, is_naflex, read_naflex

INIT_LOGIT_SCALE, INIT_LOGIT_BIAS = math.log(10), -10.0
EXACT, TANH = "none", "tanh"  # values of nn.GELU's argument ``approximate``: GELU exact, or by tanh
EPS = 1e-6  # the epsilon of every layer norm of SigLIP
# The value of ``hf_tokenizer_name`` that is written if the tokenizer is unknown. It names no repository. Without a
# value, OpenCLIP would use CLIP's tokenizer, even if the folder has a tokenizer.json.
_TOKENIZER_NOT_SAID = "tokenizer.json beside this file"
CLEANINGS = ("canonicalize", "lower", "whitespace")  # OpenCLIP's names of the ways to clean texts
_WORDS = {EXACT: "GELU", TANH: "tanh GELU"}

# This maps timm's name of each size to the number of layers, the width, the width of a head, and mlp_ratio.
_SIZES = {
    "base": (12, 768, 64, 4.0),
    "large": (24, 1024, 64, 4.0),
    "so400m": (27, 1152, 72, 3.7362),
    "giantopt": (40, 1536, 96, 4.0),
}
# This maps the names of timm's SigLIP towers to their variant of GELU.
_TIMM = dict.fromkeys(
    (
        "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_256", "vit_base_patch16_siglip_384",
        "vit_base_patch16_siglip_512", "vit_large_patch16_siglip_256", "vit_large_patch16_siglip_384",
        "vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_378", "vit_so400m_patch14_siglip_384",
    ),
    EXACT,
) | dict.fromkeys(
    (
        "vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512", "vit_so400m_patch16_siglip_256",
        "vit_so400m_patch16_siglip_384", "vit_so400m_patch16_siglip_512", "vit_giantopt_patch16_siglip_256",
        "vit_giantopt_patch16_siglip_384",
    ),
    TANH,
)  # fmt: skip

PUBLISHED = (
    "ViT-B-16-SigLIP", "ViT-B-16-SigLIP-256", "ViT-B-16-SigLIP-384", "ViT-B-16-SigLIP-512", "ViT-B-16-SigLIP-i18n-256",
    "ViT-L-16-SigLIP-256", "ViT-L-16-SigLIP-384", "ViT-SO400M-14-SigLIP", "ViT-SO400M-14-SigLIP-378",
    "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-16-SigLIP-i18n-256",
    "ViT-B-32-SigLIP2-256", "ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2-256", "ViT-B-16-SigLIP2-384", "ViT-B-16-SigLIP2-512",
    "ViT-L-16-SigLIP2-256", "ViT-L-16-SigLIP2-384", "ViT-L-16-SigLIP2-512", "ViT-SO400M-14-SigLIP2",
    "ViT-SO400M-14-SigLIP2-378", "ViT-SO400M-16-SigLIP2-256", "ViT-SO400M-16-SigLIP2-384", "ViT-SO400M-16-SigLIP2-512",
    "ViT-gopt-16-SigLIP2-256", "ViT-gopt-16-SigLIP2-384",
)  # fmt: skip

_VISION_SIZES = tuple(field.name for field in dataclasses.fields(VisionConfig))
_TEXT_SIZES = tuple(field.name for field in dataclasses.fields(TextConfig))
# Settings in OpenCLIP's files of SigLIP models, each with the only value that clipfast's model implements.
_VISION_FIXED = {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
_TEXT_FIXED = {"no_causal_mask": True, "pool_type": "last", "norm_kwargs": {"eps": EPS}}


@dataclasses.dataclass(frozen=True)
class SigLIPConfig(CLIPConfig):
    """Settings of a SigLIP (Zhai et al. 2023) or SigLIP 2 (Tschannen et al. 2025) model for images of one size.

    The image tower is a vision transformer with attention pooling and no class token; its width is ``embed_dim``.
    The text tower has no causal mask, and its output at the last position is the feature. Layer norms have an epsilon
    of 1e-6.

    Attributes:
        image_gelu, text_gelu: the GELU of each tower: "none" is exact, "tanh" is the approximation by tanh.
        text_proj: whether a linear layer ends the text tower.
        tokenizer: the Hugging Face repository whose ``tokenizer.json`` turns texts into ids; None if it is unknown.
        clean: the cleaning of texts: "canonicalize" (lower case, no punctuation), "lower" or "whitespace".
        init_logit_scale: the initial logit_scale, the logarithm of the factor.
        init_logit_bias: the initial logit_bias.
    """

    image_gelu: str = EXACT
    text_gelu: str = EXACT
    text_proj: bool = True
    tokenizer: str | None = None
    clean: str = "whitespace"
    init_logit_scale: float = INIT_LOGIT_SCALE
    init_logit_bias: float = INIT_LOGIT_BIAS

    def __post_init__(self) -> None:
        """Refuse widths of towers that do not fit together, and unknown names.

        Raises:
            ValueError: as above.
        """
        super().__post_init__()
        vision, text = self.vision, self.text
        if not isinstance(vision.layers, int) or vision.patch_size is None:
            raise ValueError(f"a SigLIP model has a vision transformer with patches, got {vision}")
        if vision.width != self.embed_dim:
            raise ValueError(
                f"the image tower of a SigLIP model is as wide as embed_dim, got {vision.width} and {self.embed_dim}"
            )
        if not self.text_proj and text.width != self.embed_dim:
            raise ValueError(
                f"a text tower without a projection must be as wide as embed_dim, got {text.width} and {self.embed_dim}"
            )
        if self.quick_gelu:
            raise ValueError("a SigLIP model has GELU: leave quick_gelu out")
        if not {self.image_gelu, self.text_gelu} <= set(_WORDS):
            raise ValueError(f"GELU is none (exact) or tanh, got {self.image_gelu!r} and {self.text_gelu!r}")
        if isinstance(vision, NaFlexConfig) and (vision.pool, self.image_gelu) != ("map", TANH):
            raise ValueError("the NaFlex tower of a SigLIP model has attention pooling, and GELU by tanh")
        if self.clean not in CLEANINGS:
            raise ValueError(f"clean must be one of {', '.join(CLEANINGS)}, got {self.clean!r}")

    @property
    def activation(self) -> str:
        """The name of the activation in messages, or the names in both towers if they differ."""
        image, text = _WORDS[self.image_gelu], _WORDS[self.text_gelu]
        return image if image == text else f"{image} for images, {text} for texts"

    @property
    def pad_id(self) -> int:
        """The id of the padding token if the tokenizer's files name none: Gemma's for SigLIP 2, and T5's otherwise."""
        return 0 if self.text.vocab_size == 256000 else 1

    @property
    def timm_model_name(self) -> str:
        """The name of timm's image tower with these sizes and this activation.

        If timm has no such tower, this is a name that timm does not know: OpenCLIP then refuses the configuration
        instead of building another tower.
        """
        vision = self.vision
        if isinstance(vision, NaFlexConfig):
            return vision.timm_model_name
        known: dict[tuple[object, ...], str] = {sizes: word for word, sizes in _SIZES.items()}
        size = known.get((vision.layers, vision.width, vision.head_width, vision.mlp_ratio))
        if size is None:
            size = f"w{vision.width}_d{vision.layers}_h{vision.heads}"
        name = f"vit_{size}_patch{vision.patch_size}_siglip_{vision.image_size}"
        return name if _TIMM.get(name, self.image_gelu) == self.image_gelu else f"{name}_gelu_{self.image_gelu}"

    @property
    def is_in_timm(self) -> bool:
        """Whether timm, and so OpenCLIP, has an image tower of these sizes and this activation."""
        return isinstance(self.vision, NaFlexConfig) or self.timm_model_name in _TIMM

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "SigLIPConfig":
        """Read the configuration in OpenCLIP's layout, which names the image tower by timm's name.

        A tower that timm does not have is described by its sizes beside the name, and by ``act_kwargs``.

        Raises:
            ValueError: if a key is missing, or is one that this package does not implement.
        """
        more = ("custom_text", "init_logit_scale", "init_logit_bias")
        unknown = set(raw) - {"embed_dim", "vision_cfg", "text_cfg", *more}
        if unknown or not {"embed_dim", "text_cfg", "init_logit_bias"} <= set(raw):
            raise ValueError(
                "the config of a SigLIP model needs embed_dim, vision_cfg, text_cfg and init_logit_bias, and may have "
                f"init_logit_scale and custom_text; got {sorted(raw)}"
            )
        vision, image_gelu = _read_vision(raw["vision_cfg"])
        settings = dict(raw["text_cfg"])
        text_gelu = _read_gelu("text_cfg", settings.pop("act_kwargs", None))
        sizes = {key: settings.pop(key) for key in _TEXT_SIZES if key in settings}
        proj_bias, proj_type = settings.pop("proj_bias", False), settings.pop("proj_type", "linear")
        tokenizer, options = settings.pop("hf_tokenizer_name", None), settings.pop("tokenizer_kwargs", None) or {}
        _check_fixed("text_cfg", settings, _TEXT_FIXED)
        if proj_type != "none" and not proj_bias:
            raise ValueError("text_cfg: a SigLIP model has proj_bias true, or proj_type none")
        if set(options) - {"clean"}:
            raise ValueError(f"text_cfg has tokenizer_kwargs that clipfast does not implement: {options}")
        return cls(
            raw["embed_dim"], vision, TextConfig(**sizes), False, image_gelu, text_gelu, proj_type != "none",
            None if tokenizer in ("", _TOKENIZER_NOT_SAID) else tokenizer, options.get("clean", "whitespace"),
            raw.get("init_logit_scale", INIT_LOGIT_SCALE), raw["init_logit_bias"],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in OpenCLIP's layout, which OpenCLIP loads too if timm has the image tower."""
        raw = super().to_dict()
        raw["vision_cfg"] |= {"timm_model_name": self.timm_model_name} | _VISION_FIXED
        raw["text_cfg"] |= _TEXT_FIXED | ({"proj_bias": True} if self.text_proj else {"proj_type": "none"})
        if self.image_gelu == TANH and not isinstance(self.vision, NaFlexConfig):
            # timm's NaFlex towers of SigLIP 2 have GELU by tanh already without this setting.
            raw["vision_cfg"]["act_kwargs"] = {"approximate": TANH}
        if self.text_gelu == TANH:
            raw["text_cfg"]["act_kwargs"] = {"approximate": TANH}
        raw["text_cfg"]["tokenizer_kwargs"] = {"clean": self.clean}
        raw["text_cfg"]["hf_tokenizer_name"] = self.tokenizer or _TOKENIZER_NOT_SAID
        inits = {"init_logit_scale": self.init_logit_scale, "init_logit_bias": self.init_logit_bias}
        return raw | inits | {"custom_text": True}


def is_siglip(raw: Mapping[str, Any]) -> bool:
    """Return whether a configuration in OpenCLIP's layout has a SigLIP tower of timm."""
    vision = raw.get("vision_cfg")
    return isinstance(vision, Mapping) and "siglip" in str(vision.get("timm_model_name"))


def _read_vision(raw: Mapping[str, Any]) -> tuple[VisionConfig, str]:
    """Read the sizes and the activation of SigLIP's image tower from ``vision_cfg``."""
    if is_naflex(raw):
        return read_naflex(raw), TANH
    settings = dict(raw)
    name = str(settings.pop("timm_model_name"))
    sizes = {key: settings.pop(key) for key in _VISION_SIZES if key in settings}
    gelu = _read_gelu("vision_cfg", settings.pop("act_kwargs", None))
    _check_fixed("vision_cfg", settings, _VISION_FIXED, optional=("timm_model_pretrained",))
    if name not in _TIMM:
        missing = {"image_size", "layers", "width", "patch_size"} - set(sizes)
        if missing:
            raise ValueError(f"vision_cfg: clipfast does not know the tower {name!r}, and its sizes are not beside it")
        return VisionConfig(**sizes), gelu
    known, known_gelu = timm_tower(name)
    wrong = {key: value for key, value in sizes.items() if key != "patch_dropout" and getattr(known, key) != value}
    if wrong:
        raise ValueError(f"vision_cfg: {name} has other sizes than {wrong}, which OpenCLIP would overlook")
    return dataclasses.replace(known, patch_dropout=sizes.get("patch_dropout", 0.0)), known_gelu


def _read_gelu(section: str, act_kwargs: Mapping[str, Any] | None) -> str:
    """Return the variant of GELU in a section of a SigLIP configuration."""
    if act_kwargs and set(act_kwargs) != {"approximate"}:
        raise ValueError(f"{section} has act_kwargs that clipfast does not implement: {act_kwargs}")
    return str((act_kwargs or {}).get("approximate", EXACT))


def _check_fixed(
    section: str, settings: Mapping[str, Any], fixed: Mapping[str, Any], optional: tuple[str, ...] = ()
) -> None:
    """Refuse settings that a SigLIP model of clipfast does not implement."""
    expected = {key: value for key, value in fixed.items() if key in settings or key not in optional}
    if dict(settings) != expected:
        differ = {key: settings.get(key) for key in {**settings, **expected} if settings.get(key) != expected.get(key)}
        raise ValueError(f"{section} has settings that clipfast does not implement in a SigLIP model: {differ}")


def timm_tower(name: str) -> tuple[VisionConfig, str]:
    """Return the sizes and the activation of one of timm's SigLIP image towers, by its name."""
    match = re.fullmatch(r"vit_(\w+)_patch(\d+)_siglip_(\d+)", name)
    assert match is not None
    layers, width, head_width, mlp_ratio = _SIZES[match[1]]
    return VisionConfig(int(match[3]), layers, width, head_width, mlp_ratio, int(match[2])), _TIMM[name]


def naflex_config(size: str) -> SigLIPConfig:
    """Return the configuration of a published NaFlex model of SigLIP 2, "base" or "so400m"."""
    word = {"base": "B", "so400m": "SO400M"}[size]
    return dataclasses.replace(
        published_config(f"ViT-{word}-16-SigLIP2-384"), vision=NAFLEX[f"naflexvit_{size}_patch16_siglip"],
        image_gelu=TANH, tokenizer=f"timm/ViT-{word}-16-SigLIP2-256",
    )  # fmt: skip


def published_config(name: str) -> SigLIPConfig:
    """Return the configuration of a published SigLIP model, which follows from its name."""
    match = re.fullmatch(r"ViT-(\w+)-(\d+)-SigLIP(2?)(-i18n)?-?(\d*)", name)
    assert match is not None
    size, patch_size, is_second, is_multilingual, image_size = match.groups()
    word = {"B": "base", "L": "large", "SO400M": "so400m", "gopt": "giantopt"}[size]
    vision, image_gelu = timm_tower(f"vit_{word}_patch{patch_size}_siglip_{image_size or 224}")
    # The published models with the giant image tower have the text tower of SO400M.
    layers, width, head_width, mlp_ratio = _SIZES["so400m" if size == "gopt" else word]
    vocabulary = 256000 if is_second else 250000 if is_multilingual else 32000
    text = TextConfig(
        16 if name == "ViT-SO400M-14-SigLIP" else 64, vocabulary, width, width // head_width, layers, mlp_ratio
    )
    source = name if is_second else "ViT-B-16-SigLIP-i18n-256" if is_multilingual else "ViT-B-16-SigLIP"
    return SigLIPConfig(
        vision.width, vision, text, False, image_gelu, TANH if is_second else EXACT,
        name != "ViT-SO400M-16-SigLIP-i18n-256", f"timm/{source}", "canonicalize",
    )  # fmt: skip
