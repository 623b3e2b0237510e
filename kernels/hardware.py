"""The one table of hardware: limits of GPU architectures, and published rates of cards.

The rates that a card reaches in practice are taken from publications; none was measured by this project.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor of an NVIDIA compute capability, or of one compute unit of a GPU of AMD.

    Source: CUDA C++ programming guide, "Compute capabilities"; the same limits stand in NVIDIA's CCCL
    (cuda/__device/arch_traits.h). Those of AMD stand in its "HIP programming guide", "Hardware implementation".

    Attributes:
        tables: the architectures whose tables of launch configurations serve this one. The first table that has an
            entry decides. An architecture that multiplies by mma.sync uses no table that was made for wgmma or tcgen05.
        shared_bytes: shared memory of a multiprocessor.
        block_shared_bytes: shared memory that one block may ask for.
        matrix_unit: the instruction of the matrix units that half-precision products must reach, in PTX or in AMD's
            assembly.
        multiprocessors: the number of multiprocessors of the card for which launches are recorded.
        registers: 32-bit registers of a multiprocessor.
        warps: resident warps at most.
        blocks: resident blocks at most.
        tensor_columns: columns of tensor memory.
    """

    tables: tuple[int, ...]
    shared_bytes: int
    block_shared_bytes: int
    matrix_unit: str
    multiprocessors: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_columns: int = 512

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether the architecture's matrix unit reads operands from shared memory, into which the tensor memory
        accelerator loads them.

        mma.sync reads operands from registers. sm_120 has the accelerator but multiplies by mma.sync, so its kernels
        load as on sm_80, with the configurations of sm_80.
        """
        return self.matrix_unit in ("wgmma.mma_async", "tcgen05.mma")


ARCHITECTURES = {
    # A100
    80: Architecture((80,), 167936, 166912, "mma.sync", 108),
    # RTX 30, A10
    86: Architecture((86, 80), 102400, 101376, "mma.sync", 72, warps=48, blocks=16),
    # RTX 40, L4, L40S
    89: Architecture((89, 86, 80), 102400, 101376, "mma.sync", 142, warps=48, blocks=24),
    # H100, H200
    90: Architecture((90, 80), 233472, 232448, "wgmma.mma_async", 132),
    # B200
    100: Architecture((100, 90, 80), 233472, 232448, "tcgen05.mma", 148),
    # RTX 50, RTX PRO Blackwell
    120: Architecture((120, 89, 86, 80), 102400, 101376, "mma.sync", 170, warps=48, blocks=24),
}
# GPUs of AMD, by the number in their name. Their warps have 64 threads. Kernels are compiled for these GPUs without
# PTX, without limits of registers, and without tensor descriptors, but have run on none of them.
AMD = {
    # MI300A, MI300X, MI325X: gfx942
    942: Architecture((942, 86, 80), 65536, 65536, "v_mfma", 304, registers=131072, warps=32),
}


def architecture(capability: int) -> Architecture:
    """Return the limits for a compute capability (86 for 8.6): those of the newest architecture that is not newer.

    So 8.7 counts as 8.6, 10.3 as 10.0 and 12.1 as 12.0. A GPU of AMD has the number of its name, 942 for gfx942.

    Raises:
        ValueError: the compute capability is below 8.0, and the kernels do not run on it.
    """
    if capability in AMD:
        return AMD[capability]
    known = [arch for arch in ARCHITECTURES if arch <= capability]
    if not known:
        raise ValueError(f"compute capability {capability / 10:.1f} is too old: the kernels need 8.0 or newer")
    return ARCHITECTURES[max(known)]


LEAST_FP8 = 89  # the first compute capability with numbers of 8 bits: RTX 40, L4, L40S; H100; Blackwell


def has_fp8(arch: int) -> bool:
    """Return whether a GPU has e4m3, as PyTorch's float8_e4m3fn, and products of it. An MI300 has another e4m3."""
    return arch >= LEAST_FP8 and arch not in AMD


def target_name(arch: int) -> str:
    """Return the compiler's name of an architecture: "sm_90" for 90, "gfx942" for 942."""
    return f"gfx{arch}" if arch in AMD else f"sm_{arch}"


# The assumed ratio of the speed of matrix products in 8 bits to that in 16 bits, on every card. It follows published
# timings with an inner dimension of 1,024; in four of five timings on Hopper it is 1.48 to 2.14 (docs/gpu-model.md).
FP8_SPEEDUP = 1.8
COPIED = 3.0 / 3.35  # the TB/s that copies reach on an H100, over those of its data sheet


@dataclasses.dataclass(frozen=True)
class Card:
    """Published rates of a GPU and of the links that it comes with, SXM versions.

    Attributes:
        name: part of the name that the driver gives.
        arch: compute capability, 90 for sm_90.
        half_peak: dense products of bfloat16 and float16 by the data sheet, FLOP/s.
        single_peak: float32 products without TF32 by the data sheet, FLOP/s.
        half_reached: the share of ``half_peak`` that large products reach. For Hopper, 700 TFLOP/s are assumed: the
            best products of random values reach 650 to 750, since a power limit of 700 W lowers the clock. For the
            other cards, it is the best of ``torch.matmul`` in the MAMF table of Stas Bekman's "Machine Learning
            Engineering Open Book".
        single_reached: the share of ``single_peak`` that large products are assumed to reach.
        memory_bytes: size of the memory.
        memory_bytes_per_s: bandwidth of the memory by the data sheet.
        link_bytes_per_s: NVLink to other GPUs of the node, in one direction.
        network_bytes_per_s: one adapter for each GPU to other nodes: 200 Gbit/s (DGX A100) or 400 Gbit/s.
    """

    name: str
    arch: int
    half_peak: float
    single_peak: float
    half_reached: float
    single_reached: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float

    @property
    def copied_bytes_per_s(self) -> float:
        """The bandwidth that copies reach, assumed to be the same share of the data sheet's as on an H100."""
        return COPIED * self.memory_bytes_per_s

    @property
    def multiprocessors(self) -> int:
        """The number of the card's multiprocessors."""
        return ARCHITECTURES[self.arch].multiprocessors

    def peak(self, *, half: bool) -> float:
        """Return the card's dense FLOP/s by the data sheet, for 16-bit or for float32 products."""
        return self.half_peak if half else self.single_peak

    def reached(self, *, half: bool) -> float:
        """Return the FLOP/s that large products reach on the card, for 16-bit or for float32 products."""
        return self.half_peak * self.half_reached if half else self.single_peak * self.single_reached


CARDS = {
    "a100": Card("A100-SXM", 80, 312e12, 19.5e12, 0.8587, 0.80, 80e9, 2039e9, 300e9, 25e9),
    "h100": Card("H100 80GB HBM3", 90, 989.4e12, 67e12, 700 / 989.4, 0.80, 80e9, 3350e9, 450e9, 50e9),
    "h200": Card("H200", 90, 989.4e12, 67e12, 700 / 989.4, 0.80, 141e9, 4800e9, 450e9, 50e9),
    "b200": Card("B200", 100, 2250e12, 75e12, 0.7756, 0.80, 180e9, 7700e9, 900e9, 50e9),
}


def card_named(gpu: str) -> Card | None:
    """Return the card whose name is part of ``gpu``, the name that the driver gives; None if the table lacks it."""
    return next((card for card in CARDS.values() if card.name in gpu), None)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster of nodes with GPUs of one kind, and the assumed times of kernel launches and messages.

    Attributes:
        card: the GPU.
        gpus_per_node: GPUs with fast links to each other.
        launch_s: seconds that the host takes to launch a kernel.
        latency_s: seconds that a message takes in addition to the transfer of its bytes.
        short_latency_s: the same for a message of less than ``short_bytes``.

    The latencies are means over the steps of a ring with one step in eight between nodes, from the constants by which
    NCCL plans (src/graph/tuning.cc): 3.4 us by NVLink and 14 us by network with its protocol for long messages, 0.6 and
    2.7 us with the one for short messages.
    """

    card: Card
    gpus_per_node: int = 8
    launch_s: float = 10e-6
    latency_s: float = 5e-6
    short_latency_s: float = 1e-6
    short_bytes: int = 65536

    def bytes_per_s(self, gpus: int, *, is_ring: bool) -> float:
        """Return the bytes per second that each GPU of the cluster sends when ``gpus`` of them communicate.

        Between nodes, a collective uses the adapters of all GPUs of a node, as NCCL's rings do. A ring of single
        messages enters and leaves a node through one adapter.
        """
        if gpus <= self.gpus_per_node:
            return self.card.link_bytes_per_s
        adapters = 1 if is_ring else self.gpus_per_node
        return min(self.card.link_bytes_per_s, adapters * self.card.network_bytes_per_s)

    def message_s(self, gpus: int, sent: int, messages: int, *, is_ring: bool) -> float:
        """Return the seconds in which a GPU of the cluster sends ``sent`` bytes as messages, one after another."""
        latency = self.short_latency_s if sent < self.short_bytes * messages else self.latency_s
        return sent / self.bytes_per_s(gpus, is_ring=is_ring) + latency * messages
