"""CUDA's occupancy calculation: how many blocks of a kernel fit on one multiprocessor, and what is the limit."""

import dataclasses

import triton

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

    ``registers`` are those of a thread. Warps, shared memory (static and dynamic) and columns of tensor memory are
    those of a block. Tensor memory is a limit, because a block waits for free columns.
    """
    limits = ARCHITECTURES[arch]
    per_warp = triton.cdiv(max(registers, 1) * 32, REGISTER_UNIT) * REGISTER_UNIT
    per_block = triton.cdiv(shared_bytes + SHARED_RESERVED, SHARED_UNIT) * SHARED_UNIT
    allowed = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": limits.registers // SUB_PARTITIONS // per_warp * SUB_PARTITIONS // warps,
        "shared": limits.shared_bytes // per_block,
    }
    if tmem_columns:
        allowed["tmem"] = limits.tensor_columns // max(TENSOR_UNIT, triton.next_power_of_2(tmem_columns))
    blocks = min(allowed.values())
    binding = tuple(resource for resource, number in allowed.items() if number == blocks)
    return Occupancy(blocks, binding, blocks * warps / limits.warps)
