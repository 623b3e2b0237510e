"""What is tuned, and the configurations that are searched. The targets stand in the ops' specifications."""

import itertools
from collections.abc import Iterator

from clipfast.kernels import configs
from clipfast.kernels.configs import Config
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import OpSpec, Target, Tunable, specs

_TILES, _SMALL_TILES = (64, 128, 256), (16, 32, 64, 128)
SPACES: dict[type[Config], dict[str, tuple[int, ...]]] = {
    configs.GemmConfig: {
        "block_m": _TILES, "block_n": _TILES, "block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4),
    },
    configs.RowConfig: {
        "block_m": (4, 8, 16, 32), "block_n": _TILES, "num_warps": (2, 4, 8), "num_stages": (1,),
    },
    configs.ShortConfig: {"block_m": _SMALL_TILES, "num_warps": (4, 8), "num_stages": (1, 2)},
    configs.LoopedConfig: {
        "block_m": _SMALL_TILES, "block_n": _SMALL_TILES, "num_warps": (4, 8), "num_stages": (1, 2, 3),
    },
    configs.TwoPhaseConfig: {
        "own_k": _SMALL_TILES, "step_q": (16, 32, 64), "own_q": _SMALL_TILES, "step_k": (16, 32, 64),
        "num_warps": (4, 8), "num_stages": (1, 2),
    },
}  # fmt: skip
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
    num_keys = sizes["tokens"] if tunable.kind is configs.ShortConfig else None
    width = sizes["width"] if tunable.per_width else None
    whole = (size if isinstance(size, int) else None for size in (head_dim, num_keys, width))
    return configs.config_key(tunable.kernel, DTYPES[dtype], *whole)
