"""What is tuned, and the configurations that are searched. The targets stand in the ops' specifications."""

import itertools
from collections.abc import Iterator

from clipfast.kernels import configs
from clipfast.kernels.configs import Config
from clipfast.kernels.spec import OpSpec, Target, Tunable, specs

from .case import DTYPES

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
TARGETS: dict[str, tuple[OpSpec, Target]] = {
    target.name: (spec, target) for spec in specs().values() for target in spec.targets
}


def space(tunable: Tunable) -> Iterator[Config]:
    """Iterate over every configuration that is searched for a kernel."""
    axes = {**SPACES[tunable.kind], **tunable.axes}
    for values in itertools.product(*axes.values()):
        yield tunable.kind(**dict(zip(axes, values, strict=True)))


def key_of(tunable: Tunable, target: Target, dtype: str) -> str:
    """Return the key of the table entry that is tuned."""
    sizes = target.shape.to_dict()
    head_dim = sizes.get("head_dim")
    num_keys = sizes["tokens"] if tunable.kind is _SHORT else None
    width = sizes["width"] if tunable.per_width else None
    whole = (size if isinstance(size, int) else None for size in (head_dim, num_keys, width))
    return configs.config_key(tunable.kernel, DTYPES[dtype], *whole)
