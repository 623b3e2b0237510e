"""What a run takes: memory, the share of the GPU's peak that it reaches, its waiting for other ranks, power and clocks.

Everything is read when a line is logged, so that no step waits for it.
"""

import contextlib
import logging
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..flops import training_flops
from ..host import gpu_state, proc_bytes, throttles
from ..kernels.hardware import Card, card_named
from ..models import CLIP

log = logging.getLogger("clipfast")
RECENT = 33  # log lines that the usual duration of a step is taken from


class Meters:
    """The meters of one rank.

    Args:
        device: of the rank.
        parallel: what is called in a step; ``DistributedDataParallel`` measures its communication itself.
        every: steps between two readings.
    """

    def __init__(self, device: torch.device, parallel: nn.Module | None = None, every: int = 1) -> None:
        self.device, self.parallel = device, parallel
        self._flops_per_s = 0.0  # FLOPs that a step would need for an MFU of 1 in a second; 0 if that is unknown
        self._flops = 0.0
        self._tells_nvml = device.type == "cuda"
        self._was_throttled = False
        if isinstance(parallel, DistributedDataParallel):
            parallel._set_ddp_runtime_logging_sample_rate(every)

    def count_flops(self, model: Callable[[], CLIP], pairs: int, ranks: int, *, half: bool) -> str | None:
        """Count the FLOPs of a step, and return a sentence on what MFU means in this run; None if there is none.

        Args:
            model: builds the model on "meta".
            pairs: of all ranks together.
            ranks: how many there are.
            half: whether products have 16 bits.
        """
        card = self._card()
        if card is None:
            return None
        self._flops, self._flops_per_s = training_flops(model(), pairs), ranks * card.peak(half=half)
        return (
            f"MFU: a step has {self._flops / 1e12:,.4g} TFLOP of the model, without what is computed a second time, "
            f"and {ranks} x {card.name} reach {self._flops_per_s / 1e12:,.4g} TFLOP/s by the data sheet"
        )

    def _card(self) -> Card | None:
        return card_named(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    def read(self, step_seconds: float) -> dict[str, Any]:
        """Return the figures for a line of metrics; what cannot be measured here is left out.

        ``mfu``: of the peak of all ranks' GPUs. ``communication``: the share of a step's time in which
        ``DistributedDataParallel`` sums gradients, or waits for a slower rank to do so, after the backward pass has
        computed them, in the last step that it looked at; the exchange of features in the loss is not part of it.
        ``memory``: bytes, on a GPU the peak so far. ``gpu``: what NVML says.

        Args:
            step_seconds: duration of a step.
        """
        found: dict[str, Any] = {"memory": self._memory()}
        if self._flops_per_s:
            found["mfu"] = self._flops / step_seconds / self._flops_per_s
        exposed = self._exposed_seconds()
        if exposed is not None:
            found["communication"] = min(exposed / step_seconds, 1.0)
        if self._tells_nvml:
            found |= self._gpu()
        return found

    def _memory(self) -> dict[str, int]:
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            return {"allocated": allocated(self.device), "reserved": reserved(self.device)}
        with contextlib.suppress(OSError, RuntimeError):
            return {"resident": proc_bytes("self/status", "VmRSS")}
        return {}

    def _exposed_seconds(self) -> float | None:
        if not isinstance(self.parallel, DistributedDataParallel):
            return None
        times = self.parallel._get_ddp_logging_data()
        names = "backward_comm_time", "backward_compute_comm_overlap_time"
        if not all(name in times for name in names):  # before the first steps that it looks at
            return None
        whole, hidden = (float(times[name]) * 1e-9 for name in names)
        return max(whole - hidden, 0.0)

    def _gpu(self) -> dict[str, Any]:
        try:
            state = gpu_state(self.device)
        except Exception:  # a driver may lack NVML, or a container may hide it: a run needs none of it
            self._tells_nvml = False
            return {}
        if state["throttled"] and not self._was_throttled:
            self._was_throttled = True
            log.warning(
                f"{self.device} runs slower than it could, by {', '.join(throttles(state['reasons']))}: "
                f"{state['sm_mhz']} MHz, {state['power_w']:.0f} W, {state['temperature_c']} °C. It is said once; "
                "metrics.jsonl has the figures of each line."
            )
        return {"gpu": state}


class Remaining:
    """The time that a run still takes.

    A step is taken to last as long as is usual now. What steps do not explain, such as evaluations and saves, is spread
    over all steps since this process began, and comes on top.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._last: tuple[int, float] | None = None
        self._steps, self._extra = 0, 0.0

    def at(self, step: int, total: int, now: float) -> float | None:
        """Return the seconds from ``now``, when ``step`` of ``total`` steps are finished; None if they are not known.

        The steps before the first call are not looked at: much is prepared in them.
        """
        last, self._last = self._last, (step, now)
        if last is None or step <= last[0]:
            return 0.0 if step >= total else None
        steps, seconds = step - last[0], now - last[1]
        self._durations.append(seconds / steps)
        usual = statistics.median(self._durations)
        self._steps += steps
        self._extra += seconds - steps * usual
        return (total - step) * max(usual + self._extra / self._steps, 0.0)
