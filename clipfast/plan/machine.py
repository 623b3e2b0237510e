"""Rates of the machines that a plan is for. What a card reaches is taken from publications, not measured here."""

import dataclasses

import torch

from .scratch import GpuScratch

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU and the links that it comes with.

    Attributes:
        half_tflops: what products of bfloat16 and float16 reach, 1e12 FLOPs per second.
        single_tflops: what products of float32 reach, without TF32, which the kernels do not use for it.
        memory_gb: size, 1e9 bytes.
        memory_gbs: bandwidth, 1e9 bytes per second.
        link_gbs: to other GPUs of the node, 1e9 bytes per second in one direction.
        network_gbs: to other nodes, likewise.
        arch: compute capability, 90 for sm_90.
        multiprocessors: number of them.
    """

    half_tflops: float
    single_tflops: float
    memory_gb: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float
    arch: int
    multiprocessors: int


# 16-bit products: the best that torch.matmul reached in bfloat16 in the MAMF table of Stas Bekman's "Machine Learning
# Engineering Open Book": 86% (A100), 80% (H100, H200) and 78% (B200) of the data sheets' dense rates of 312, 989 and
# 2,250. Float32: 80% of the data sheets' 19.5, 67 and 75. Sizes, bandwidths and NVLink: NVIDIA's data sheets, SXM
# versions. Network: an adapter for each GPU, of 200 Gbit/s (DGX A100) or 400 Gbit/s (DGX H100, H200, B200).
CARDS = {
    "a100": Card(267.9, 15.6, 80, 2039, 300, 25, 80, 108),
    "h100": Card(794.5, 53.6, 80, 3350, 450, 50, 90, 132),
    "h200": Card(794.5, 53.6, 141, 4800, 450, 50, 90, 132),
    "b200": Card(1745.0, 60.0, 180, 7700, 900, 50, 100, 148),
}
# Of a message between GPUs, and of the host that starts a kernel: assumed, for want of a measurement.
LATENCY_US, LAUNCH_US = 5.0, 10.0
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a plan is for: a card, and what is known better than its table says.

    Args:
        card: of ``CARDS``.
        tflops: of products in the dtype of the plan, 1e12 FLOPs per second; None takes the card's.
        memory_gb: what the loss and its features may take, 1e9 bytes; None takes all that the card has.
        link_gbs: bytes per second in 1e9 that a GPU sends to others of its node; None takes the card's.
        network_gbs: likewise to other nodes.
        gpus_per_node: GPUs with fast links to each other.
        latency_us: of one message, microseconds.
        launch_us: of the host, for a kernel, microseconds.

    Raises:
        ValueError: an unknown card, or a rate that is not positive.
    """

    card: str = "h100"
    tflops: float | None = None
    memory_gb: float | None = None
    link_gbs: float | None = None
    network_gbs: float | None = None
    gpus_per_node: int = GPUS_PER_NODE
    latency_us: float = LATENCY_US
    launch_us: float = LAUNCH_US

    def __post_init__(self) -> None:
        if self.card not in CARDS:
            raise ValueError(
                f"--card: unknown {self.card!r}; known: {', '.join(CARDS)}. For another, take the nearest of these and "
                "give --tflops, --memory-gb, --link-gbs and --network-gbs"
            )
        for name in ("tflops", "memory_gb", "link_gbs", "network_gbs", "gpus_per_node"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be more than 0, got {value}")
        for name in ("latency_us", "launch_us"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")

    def scratch(self, embed_dim: int, dtype: torch.dtype) -> GpuScratch:
        """What the kernels hold for a while on this card."""
        card = CARDS[self.card]
        return GpuScratch(embed_dim, dtype, card.arch, card.multiprocessors)

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Of products of ``dtype``."""
        card = CARDS[self.card]
        rate = self.tflops if self.tflops is not None else card.half_tflops
        return 1e12 * (card.single_tflops if self.tflops is None and dtype == torch.float32 else rate)

    @property
    def bytes_per_s(self) -> float:
        """Of the card's memory."""
        return GB * CARDS[self.card].memory_gbs

    @property
    def memory_bytes(self) -> float:
        """What the loss and its features may take."""
        return GB * (CARDS[self.card].memory_gb if self.memory_gb is None else self.memory_gb)

    def wire_bytes_per_s(self, gpus: int, *, ring: bool) -> float:
        """Bytes that a rank sends per second. Between nodes, a collective spreads over the adapters of all GPUs of a
        node, as NCCL's rings do; a ring of single messages enters and leaves a node by one.
        """
        card = CARDS[self.card]
        link = GB * (card.link_gbs if self.link_gbs is None else self.link_gbs)
        network = GB * (card.network_gbs if self.network_gbs is None else self.network_gbs)
        if gpus <= self.gpus_per_node:
            return link
        return min(link, network if ring else network * self.gpus_per_node)
