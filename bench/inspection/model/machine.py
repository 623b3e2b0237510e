"""The rates and latencies of a GPU, each with its source. None was chosen for one particular kernel."""

import dataclasses

from clipfast.kernels.hardware import CARDS, COPIED

WARP = 32


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates and latencies of a GPU of compute capability 9.0. Rates are of the whole GPU, in bytes per second.

    The letter after each one says where it comes from: (s) a data sheet, whitepaper or the CUDA programming guide; (m)
    published microbenchmarks: arXiv:2402.13499, arXiv:2501.12084, and chipsandcheese.com, "Nvidia's H100: Funny L2";
    (a) assumed.

    Attributes:
        name: the name of the card.
        clock: Hz, for kernels that keep the matrix unit busy (a). The data sheet's 989 TFLOP/s are 132 multiprocessors
            times 4096 times 1.83 GHz; under a full load of random 16-bit values, 700 W lower the clock.
        boost: Hz, for all other kernels: the highest clock of an H100 SXM (s).
        multiprocessors: the number of multiprocessors (s).
        l2_rate: the rate of TMA loads. L2 reads 5,120 bytes per cycle in all (s, of the A100; GH100 has the same two
        halves).
        lane_rate: the rate of loads and stores by lanes, including cp.async: 5.5 to 5.7 TB/s on the 114 multiprocessors
            of an H100 PCIe at 1.755 GHz (m), which is 28 bytes per cycle for each. This and ``boost`` were chosen with
            published times of kernels in view (docs/gpu-model.md).
        hbm_rate: the rate that copies reach: 3.0 of the data sheet's 3.35 TB/s (m).
        l2_latency: cycles from a load of L2 to its use, 260 to 280 (m).
        hbm_latency: cycles from a load of device memory to its use, 600 to 700 (m).
        tma_latency: cycles that a TMA load takes in addition (m).
        shared_rate: bytes per cycle of one multiprocessor's shared memory (s).
        reaction: cycles until a warp goes on after it has waited for a unit outside its sub-partition: a group of wgmma
            products, a barrier of the block or of a TMA load, a fence, or TMA, which reads an instruction's operands.
            No source measures it under load: 120 was chosen among 22, 80, 100, 120 and 140 with published times of
            kernels in view (docs/gpu-model.md).
        block_gap: cycles from the end of a block to the start of the next one in its place (a).
        launch: seconds that an empty kernel takes on the device, if kernels follow each other in a stream (a).
        power_flops: FLOP/s of the matrix unit, padding included, above which the limit of 700 W lowers the clock (a).
            The best products with random values end at 650 to 750 TFLOP/s.
    """

    name: str = "H100"
    clock: float = 1.755e9
    boost: float = 1.98e9
    multiprocessors: int = 132
    l2_rate: float = 5120 * 1.755e9
    lane_rate: float = 28 * 132 * 1.755e9
    hbm_rate: float = COPIED * 3.35e12
    l2_latency: int = 270
    hbm_latency: int = 650
    tma_latency: int = 170
    shared_rate: float = 128.0
    reaction: int = 120
    block_gap: int = 400
    launch: float = 2.5e-6
    power_flops: float = CARDS["h100"].reached(half=True)

    def op_seconds(self, flops: float, moved: float) -> float:
        """Return the time of a PyTorch op: its FLOPs or its bytes, whichever take longer, and a launch."""
        return max(flops / self.power_flops, moved / self.hbm_rate) + self.launch

    def cycles_per_byte(self, rate: float) -> float:
        """Return the cycles per byte of a simulated multiprocessor for its share of the whole GPU's ``rate``."""
        return self.clock * self.multiprocessors / rate


H100 = Machine()
# Copies are assumed to reach the same fraction of the data sheet's rate as on an H100.
H200 = dataclasses.replace(H100, name="H200", hbm_rate=COPIED * 4.8e12)
MACHINES = {"h100": H100, "h200": H200}
