"""The settings of NaFlex image towers, by the names of timm's towers in OpenCLIP's configurations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..kernels.patch_embed_packed.op import INTERPOLATIONS
from .model_config import VisionConfig

POOLS = {"map": "none", "avg": "linear"}  # maps each pooling to OpenCLIP's name of the projection after it
MOST_PATCHES = 1024  # patches of an image in evaluation if a configuration gives no number, as in OpenCLIP


@dataclasses.dataclass(frozen=True)
class NaFlexConfig(VisionConfig):
    """Settings of an image tower for images of several sizes, in addition to those of :class:`VisionConfig`.

    Attributes:
        image_seq_len: the patches of an image in evaluation; None if the configuration does not say it.
        pool: "map" (attention pooling) or "avg" (the mean of the patches, a norm, and a projection).
        reg_tokens: register tokens before the patches of each image (Darcet et al. 2024).
        init_values: the initial factors of LayerScale at the end of each branch; None for blocks without LayerScale.
        interpolation: how positions are resized, "bilinear" or "bicubic".
        pos_embed_grid_size: the rows and columns of the table of positions.
        enable_patch_interpolator: let timm's tower take patches of other sizes, as clipfast's always does.
    """

    image_seq_len: int | None = None
    pool: str = "map"
    reg_tokens: int = 0
    init_values: float | None = None
    interpolation: str = "bilinear"
    pos_embed_grid_size: tuple[int, int] = (16, 16)
    enable_patch_interpolator: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that clipfast does not implement in a NaFlex tower.

        Raises:
            ValueError: as above.
        """
        super().__post_init__()
        if not isinstance(self.layers, int) or self.patch_size is None:
            raise ValueError(f"a NaFlex tower is a vision transformer with patches, got {self}")
        if self.pool not in POOLS or self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"a NaFlex tower has pool map or avg and interpolation bilinear or bicubic, got {self.pool!r} and "
                f"{self.interpolation!r}"
            )
        counts = (1 if self.image_seq_len is None else self.image_seq_len, *self.pos_embed_grid_size)
        if len(self.pos_embed_grid_size) != 2 or min(counts) < 1 or self.reg_tokens < 0:
            raise ValueError(
                "a NaFlex tower needs image_seq_len and two pos_embed_grid_size of at least 1, and reg_tokens "
                f"of at least 0, got {self.image_seq_len}, {self.pos_embed_grid_size} and {self.reg_tokens}"
            )
        if self.pool == "map" and self.reg_tokens:
            raise ValueError("clipfast builds no NaFlex tower with attention pooling and reg_tokens")
        if self.patch_dropout:
            raise ValueError("clipfast drops no patches in a NaFlex tower: leave patch_dropout out")

    @property
    def depth(self) -> int:
        """The number of blocks of the NaFlex tower."""
        assert isinstance(self.layers, int)
        return self.layers

    @property
    def patch(self) -> int:
        """The side of a patch of the NaFlex tower in pixels."""
        assert self.patch_size is not None
        return self.patch_size

    @property
    def timm_model_name(self) -> str:
        """The name of timm's NaFlex tower with these settings or, if there is none, of one with the same pooling."""
        own = _sizes(self)
        return next(
            (name for name, tower in TIMM.items() if tower.pool == self.pool and _sizes(tower) == own),
            next(name for name, tower in TIMM.items() if tower.pool == self.pool),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in OpenCLIP's layout: timm's name of a tower, and the settings that differ from it."""
        base = _sizes(TIMM[self.timm_model_name])
        differ = {key: value for key, value in _sizes(self).items() if value != base[key]}
        if "pos_embed_grid_size" in differ:
            differ["pos_embed_grid_size"] = list(self.pos_embed_grid_size)
        raw = {
            "image_size": self.image_size, "image_seq_len": self.image_seq_len,
            "timm_model_name": self.timm_model_name, "timm_model_pretrained": False, "timm_pool": self.pool,
            "timm_proj": POOLS[self.pool], "timm_model_kwargs": differ,
        }  # fmt: skip
        return {key: value for key, value in raw.items() if value is not None and value != {}}


def _sizes(tower: NaFlexConfig) -> dict[str, Any]:
    """Return the settings of a NaFlex tower by the names of timm's arguments."""
    return {
        "patch_size": tower.patch_size, "embed_dim": tower.width, "depth": tower.layers, "num_heads": tower.heads,
        "mlp_ratio": tower.mlp_ratio, "reg_tokens": tower.reg_tokens, "init_values": tower.init_values,
        "pos_embed_interp_mode": tower.interpolation, "pos_embed_grid_size": tower.pos_embed_grid_size,
        "enable_patch_interpolator": tower.enable_patch_interpolator,
    }  # fmt: skip


_SIGLIP = NaFlexConfig(384, image_seq_len=576)
TIMM = {
    "naflexvit_base_patch16_gap": NaFlexConfig(pool="avg", reg_tokens=4, init_values=1e-5, interpolation="bicubic"),
    "naflexvit_base_patch16_siglip": _SIGLIP,
    "naflexvit_so400m_patch16_siglip": dataclasses.replace(
        _SIGLIP, layers=27, width=1152, head_width=72, mlp_ratio=3.7362
    ),
}


def is_naflex(raw: Mapping[str, Any]) -> bool:
    """Return whether the ``vision_cfg`` of a configuration in OpenCLIP's layout names a NaFlex tower of timm."""
    return isinstance(raw, Mapping) and str(raw.get("timm_model_name")).startswith("naflexvit")


def read_naflex(raw: Mapping[str, Any]) -> NaFlexConfig:
    """Read the settings of a NaFlex tower from ``vision_cfg`` in OpenCLIP's layout.

    Raises:
        ValueError: the tower or one of its settings is not one that clipfast implements.
    """
    settings = dict(raw)
    name = settings.pop("timm_model_name")
    if name not in TIMM:
        raise ValueError(f"vision_cfg: clipfast builds no tower {name!r}, only {', '.join(TIMM)}")
    base, kwargs = TIMM[name], dict(settings.pop("timm_model_kwargs", None) or {})
    unknown = {key: value for key, value in kwargs.items() if key not in _sizes(base)}
    if unknown:
        raise ValueError(f"vision_cfg has timm_model_kwargs that clipfast does not implement: {unknown}")
    sizes = _sizes(base) | kwargs
    found = {key: settings.pop(key) for key in ("image_size", "image_seq_len", "patch_dropout") if key in settings}
    expected = {
        "timm_pool": base.pool,
        "timm_proj": POOLS[base.pool],
        "timm_proj_bias": False,
        "timm_model_pretrained": False,
    }
    given = {"timm_pool": "avg", "timm_proj": "linear"} | settings
    wrong = {key: value for key, value in given.items() if key not in expected or expected[key] != value}
    if wrong:
        raise ValueError(f"vision_cfg has settings that clipfast does not implement in a NaFlex tower: {wrong}")
    return dataclasses.replace(
        base, patch_size=sizes["patch_size"], width=sizes["embed_dim"], layers=sizes["depth"],
        head_width=sizes["embed_dim"] // sizes["num_heads"], mlp_ratio=sizes["mlp_ratio"],
        reg_tokens=sizes["reg_tokens"], init_values=sizes["init_values"],
        interpolation=sizes["pos_embed_interp_mode"], pos_embed_grid_size=tuple(sizes["pos_embed_grid_size"]),
        enable_patch_interpolator=sizes["enable_patch_interpolator"], **found,
    )  # fmt: skip
