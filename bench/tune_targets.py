"""What is tuned: kernels, the shapes that stand for their use, and the configurations that are searched."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from clipfast.kernels import configs

from .case import DTYPES
from .suites import Shape

Config = configs.Config


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A kernel that has configurations.

    Attributes:
        kernel: its name in the tables.
        function: name of the Triton function.
        kind: of its configurations.
        axes: what is searched in place of :data:`SPACES`, for the fields that it names.
        per_width: whether it has entries by the width of its rows.
        small_tiles: whether its tiles have too few rows for the largest matrix units.
    """

    kernel: str
    function: str
    kind: type[Config]
    axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    per_width: bool = False
    small_tiles: bool = False


@dataclasses.dataclass(frozen=True)
class Target:
    """What is tuned together: the kernels of an op, at the shape that stands for its use.

    Attributes:
        suite: that builds it.
        shape: of the suite.
        kernels: in the order of their worth.
        logit_scale: in place of the suite's, where it decides which kernel does the work.
    """

    suite: str
    shape: Shape
    kernels: tuple[Tunable, ...]
    logit_scale: float | None = None


_GEMM, _ROWS = configs.GemmConfig, configs.RowConfig
_SHORT, _LOOPED, _TWO_PHASE = configs.ShortConfig, configs.LoopedConfig, configs.TwoPhaseConfig
SPACES: dict[type[Config], dict[str, tuple[int, ...]]] = {
    _GEMM: {
        "block_m": (64, 128, 256),
        "block_n": (64, 128, 256),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    _ROWS: {"block_m": (4, 8, 16, 32), "block_n": (64, 128, 256), "num_warps": (2, 4, 8), "num_stages": (1,)},
    _SHORT: {"block_m": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    _LOOPED: {
        "block_m": (16, 32, 64, 128),
        "block_n": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    _TWO_PHASE: {
        "own_k": (16, 32, 64, 128),
        "step_q": (16, 32, 64),
        "own_q": (16, 32, 64, 128),
        "step_k": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
}
_LONG = (
    Tunable("attention_looped_fwd", "_looped_fwd_kernel", _LOOPED),
    Tunable("attention_two_phase_bwd", "_two_phase_bwd_kernel", _TWO_PHASE),
)
_SHORT_BOTH = (
    Tunable("attention_short_bwd", "_short_bwd_kernel", _SHORT),
    Tunable("attention_short_fwd", "_short_fwd_kernel", _SHORT),
)


def _whole_rows(kernel: str, width: int) -> Tunable:
    """A kernel that holds whole rows: up to four at a time in tiles of the entry's width."""
    widest = min(limit for limit in configs.WIDTHS if width <= limit)
    axes = {"block_m": (1, 2, 4), "block_n": (widest,), "num_warps": (2, 4, 8, 16), "num_stages": (1, 2, 3)}
    return Tunable(kernel, f"_{kernel}_kernel", _ROWS, axes, per_width=True)


def _norm(rows: int, width: int) -> Target:
    """Layer norm with the addition of a residual: what a block has twice."""
    kernels = (_whole_rows("layer_norm_bwd", width), _whole_rows("layer_norm_fwd", width))
    return Target("layer_norm", {"rows": rows, "width": width, "residual": True}, kernels)


def _norm_pair(rows: int, width: int) -> Target:
    kernels = (_whole_rows("layer_norm_pair_bwd", width), _whole_rows("layer_norm_pair_fwd", width))
    return Target("layer_norm_pair", {"rows": rows, "width": width}, kernels)


_ACT = {"block_m": (2, 4, 8, 16), "block_n": (128, 256, 512, 1024), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)}
_POOL = {"block_m": (16,), "block_n": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)}
TARGETS = {
    "contrastive": Target(
        "loss",
        {"pairs": 16384, "embed_dim": 512},
        (
            Tunable("contrastive_grad_tile", "_grad_tile_kernel", _GEMM),
            Tunable("contrastive_products", "_products_kernel", _GEMM),
            Tunable("contrastive_stats", "_stats_kernel", _GEMM),
            Tunable("contrastive_rows", "_finish_kernel", _ROWS),
        ),
    ),
    "attention-64": Target(
        "attention", {"batch": 64, "tokens": 577, "heads": 16, "head_dim": 64, "causal": False}, _LONG
    ),
    "attention-128": Target(
        "attention", {"batch": 64, "tokens": 577, "heads": 16, "head_dim": 104, "causal": False}, _LONG
    ),
    "attention-50": Target(
        "attention", {"batch": 1024, "tokens": 50, "heads": 12, "head_dim": 64, "causal": False}, _SHORT_BOTH
    ),
    "attention-77": Target(
        "attention", {"batch": 1024, "tokens": 77, "heads": 8, "head_dim": 64, "causal": True}, _SHORT_BOTH
    ),
    "attention-197": Target(
        "attention", {"batch": 256, "tokens": 197, "heads": 12, "head_dim": 64, "causal": False}, _SHORT_BOTH
    ),
    "attention-257": Target(
        "attention", {"batch": 256, "tokens": 257, "heads": 16, "head_dim": 64, "causal": False}, _SHORT_BOTH[1:]
    ),
    "patch_embed": Target(
        "patch",
        {"batch": 256, "size": 224, "patch": 14, "embed_dim": 1024},
        tuple(Tunable(name, f"_{name}_kernel", _GEMM) for name in ("patch_embed_fwd", "patch_embed_bwd_weight")),
    ),
    # 256 images of L/14 and of bigG/14; no model is wider
    "layer_norm-1024": _norm(65792, 1024),
    "layer_norm-2048": _norm(65792, 1664),
    "layer_norm-4096": _norm(16384, 4096),
    "layer_norm-8192": _norm(8192, 8192),
    "layer_norm_pair-1024": _norm_pair(65792, 1024),
    "layer_norm_pair-2048": _norm_pair(65792, 1664),
    "layer_norm_pair-4096": _norm_pair(16384, 4096),
    "bias_act": Target(
        "bias_act",
        {"rows": 65792, "width": 4096, "quick": False},
        tuple(Tunable(name, f"_{name}_kernel", _ROWS, _ACT) for name in ("bias_act_bwd", "bias_act_fwd")),
    ),
    "attention_pool": Target(
        "attention_pool",
        {"batch": 256, "queries": 32, "tokens": 50, "width": 2048},
        (Tunable("attention_pool", "_pool_bwd_kernel", _ROWS, _POOL, small_tiles=True),),
    ),
    "text_embed": Target(
        "text",
        {"batch": 1024, "tokens": 77, "vocab": 49408, "width": 512},
        (
            Tunable("text_embed_bwd", "_segment_sums_kernel", _ROWS),
            Tunable("text_embed_fwd", "_text_embed_fwd_kernel", _ROWS),
        ),
    ),
    "patch_embed_kept": Target(
        "patch_kept",
        {"batch": 256, "size": 224, "patch": 16, "embed_dim": 768},
        (Tunable("patch_embed_bwd_pos", "_patch_embed_bwd_pos_kernel", _ROWS),),
    ),
    "patch_embed_images": Target(
        "patch_floats",
        {"batch": 64, "size": 224, "patch": 14, "embed_dim": 1024},
        (Tunable("patch_embed_bwd_images", "_patch_embed_bwd_images_kernel", _GEMM),),
    ),
    "retrieval_ranks": Target(
        "retrieval",
        {"images": 5120, "texts": 25600, "embed_dim": 512},
        (Tunable("retrieval_ranks", "_count_ahead_kernel", _GEMM),),
    ),
    "sigmoid": Target(
        "sigmoid",
        {"pairs": 16384, "embed_dim": 512},
        tuple(Tunable(name, f"_{name}_kernel", _GEMM) for name in ("sigmoid_grad_tile", "sigmoid_sums")),
    ),
    # so large a scale that sums with one shift underflow, and maxima are needed
    "contrastive-online": Target(
        "loss",
        {"pairs": 16384, "embed_dim": 512},
        (Tunable("contrastive_online_stats", "_online_stats_kernel", _GEMM),),
        logit_scale=1000.0,
    ),
}


def space(tunable: Tunable) -> Iterator[Config]:
    """Every configuration that is searched for a kernel."""
    axes = {**SPACES[tunable.kind], **tunable.axes}
    for values in itertools.product(*axes.values()):
        yield tunable.kind(**dict(zip(axes, values, strict=True)))


def key_of(tunable: Tunable, target: Target, dtype: str) -> str:
    """The entry of the tables that is tuned."""
    head_dim = target.shape.get("head_dim")
    num_keys = target.shape["tokens"] if tunable.kind is _SHORT else None
    width = target.shape["width"] if tunable.per_width else None
    sizes = (size if isinstance(size, int) else None for size in (head_dim, num_keys, width))
    return configs.config_key(tunable.kernel, DTYPES[dtype], *sizes)
