"""CUDA's occupancy calculation: how many blocks of a kernel fit on one multiprocessor, and what is the limit."""

import dataclasses
import math

from clipfast.kernels.hardware import ARCHITECTURES

# Units of allocation, as cuda_occupancy.h rounds. Registers are allocated for a warp at a time, in one of four
# sub-partitions.
REGISTER_UNIT = 256
SUB_PARTITIONS = 4
SHARED_RESERVED = 1024  # bytes of each block that the system takes
SHARED_UNIT = 128
TENSOR_UNIT = 32  # and a power of two


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Blocks per multiprocessor, the resources that allow no more, and the resident share of the possible warps."""

    blocks: int
    limits: tuple[str, ...]
    warps: float


def occupancy(arch: int, *, registers: int, warps: int, shared_bytes: int, tmem_columns: int = 0) -> Occupancy:
    """Compute the occupancy of a kernel.

    Args:
        arch: compute capability, 80, 90 or 100.
        registers: registers per thread.
        warps: warps per block.
        shared_bytes: shared memory per block, static and dynamic.
        tmem_columns: columns of tensor memory per block. They are a limit, because a block waits for free columns.

    Raises:
        ValueError: ``arch`` is unknown, or there are no warps.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(map(str, ARCHITECTURES))}, got {arch}")
    if warps < 1:
        raise ValueError(f"warps must be at least 1, got {warps}")
    limits = ARCHITECTURES[arch]
    per_warp = _up(max(registers, 1) * 32, REGISTER_UNIT)
    allowed = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": limits.registers // SUB_PARTITIONS // per_warp * SUB_PARTITIONS // warps,
        "shared": limits.shared_bytes // _up(shared_bytes + SHARED_RESERVED, SHARED_UNIT),
    }
    if tmem_columns:
        columns = max(TENSOR_UNIT, 2 ** math.ceil(math.log2(tmem_columns)))
        allowed["tmem"] = limits.tensor_columns // columns
    blocks = min(allowed.values())
    binding = tuple(resource for resource, number in allowed.items() if number == blocks)
    return Occupancy(blocks, binding, blocks * warps / limits.warps)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
