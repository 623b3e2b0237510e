"""One multiprocessor running the instructions of a kernel, in clock cycles.

The warps of one or more blocks run the same instructions on four sub-partitions. The model keeps account of

* issue: one instruction per cycle and sub-partition, and the stall count of the control code after each;
* the six scoreboards of a warp, as the control codes set them and wait for them;
* the pipes of a sub-partition, and shared memory with shuffles, which the whole multiprocessor has once;
* the matrix unit: ``wgmma`` runs beside the warp and is waited for by group;
* memory: the link to L2 and this multiprocessor's share of HBM are queues, and each has a latency;
* groups of ``cp.async``, TMA loads with the barriers that wait for them, TMA stores, and barriers of a block.

It leaves out bank conflicts, the instruction cache, register ports, the L1 cache, warps with different roles, clusters,
and other multiprocessors except through the shares of L2 and HBM.
"""

import collections
import dataclasses
import heapq
import math
from collections.abc import Sequence

from ..offline import SUB_PARTITIONS
from ..sass import NO_SCOREBOARD
from .machine import Machine
from .steps import PIPES, UNIFORM, Kind, Step

_RETRY = 20  # cycles until a warp tests a barrier again if its TMA load has not been started yet
# If at most this share of the bytes comes from HBM, loads arrive after the latency of L2. Bytes that all 132
# multiprocessors read at the same time come from HBM once, and all multiprocessors wait for them.
_MOSTLY_HITS = 0.5 / 132


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a simulation: cycles until the last block ends, and the cycles for which each unit was busy."""

    cycles: float
    busy: dict[str, float]


def run(
    program: Sequence[Step], warps: int, *, blocks: int = 1, rounds: int = 1, machine: Machine, hbm_share: float = 1.0
) -> Run:
    """Simulate a multiprocessor that runs ``blocks`` blocks at once, ``rounds`` times one after another.

    Args:
        program: the instructions that each warp runs.
        warps: the number of warps of a block.
        blocks: the number of blocks that share the multiprocessor.
        rounds: how many blocks run one after another in the place of each of the ``blocks``.
        machine: rates and latencies.
        hbm_share: the fraction of loaded and stored bytes that HBM moves; the rest is in L2.
    """
    return _Multiprocessor(program, warps, blocks, rounds, machine, hbm_share).run()


class _Warp:
    """The state of one simulated warp: its place in the program, and the operations that it has started and not
    awaited.
    """

    __slots__ = ("at", "block", "boards", "copies", "copying", "groups", "leads", "number", "part", "rounds", "tries")

    def __init__(self, number: int, block: "_Block", leads: bool) -> None:
        self.number, self.part, self.block, self.leads = number, number % SUB_PARTITIONS, block, leads
        self.at = self.rounds = self.tries = 0
        self.boards = [0.0] * 6  # when each scoreboard is free
        self.groups: collections.deque[float] = collections.deque()  # when each group of products is complete
        self.copies: collections.deque[float] = collections.deque()  # when each group of cp.async is complete
        self.copying = 0.0

    def restart(self) -> None:
        """Put the simulated warp at the start of the program, for the next block."""
        self.at = self.tries = 0
        self.groups.clear()
        self.copies.clear()


class _Block:
    """The state that the warps of a block share: when TMA loads arrive, and which warps wait at a barrier."""

    __slots__ = ("arrivals", "waiting", "warps")

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.arrivals: list[float] = []
        self.waiting: list[tuple[_Warp, float]] = []


class _Multiprocessor:
    """The state of the simulation: its warps, when each unit is free again, and the events that are due."""

    def __init__(
        self, program: Sequence[Step], warps: int, blocks: int, rounds: int, machine: Machine, hbm_share: float
    ) -> None:
        self.program, self.rounds, self.machine = program, rounds, machine
        self.l2_cost, self.lane_cost, hbm = map(
            machine.cycles_per_byte, (machine.l2_rate, machine.lane_rate, machine.hbm_rate)
        )
        self.hbm_cost = hbm_share * hbm
        self.load_latency = machine.hbm_latency if hbm_share > _MOSTLY_HITS else machine.l2_latency
        self.warps: list[_Warp] = []
        for _ in range(blocks):
            block = _Block(warps)
            self.warps += [_Warp(len(self.warps) + place, block, place == 0) for place in range(warps)]
        self.free, self.matrix_free = [0.0] * SUB_PARTITIONS, [0.0] * SUB_PARTITIONS
        self.pipes = [dict.fromkeys([*PIPES, UNIFORM], 0.0) for _ in range(SUB_PARTITIONS)]
        self.shared = self.l2 = self.hbm = self.stored = self.end = 0.0
        self.busy: dict[str, float] = collections.defaultdict(float)
        self.queues: list[list[tuple[float, int]]] = [[] for _ in range(SUB_PARTITIONS)]
        for number, warp in enumerate(self.warps):
            self.queues[warp.part].append((0.0, number))
        # ``due`` has the time of each sub-partition's next event. Entries of ``order`` with another time are stale.
        self.due = [math.inf] * SUB_PARTITIONS
        self.order: list[tuple[float, int]] = []
        for part in range(SUB_PARTITIONS):
            self._schedule(part)

    def run(self) -> Run:
        """Simulate until all warps have ended, and return the cycles."""
        order, queues, free, program = self.order, self.queues, self.free, self.program
        while order:
            due, part = heapq.heappop(order)
            if due != self.due[part]:
                continue
            self.due[part] = math.inf
            queue = queues[part]
            # An event is due no earlier than its sub-partition is free: all events happen in the order of time.
            now = max(queue[0][0], free[part])
            if now <= due:
                number = queue[0][1]
                warp = self.warps[number]
                step = program[warp.at]
                need = self._need(warp, step, now)
                if need <= now:
                    heapq.heappop(queue)
                    following = self._issue(warp, step, now)
                    if following is not None:
                        heapq.heappush(queue, (following, number))
                else:
                    heapq.heapreplace(queue, (need, number))
            self._schedule(part)
        return Run(self.end, dict(self.busy))

    def _schedule(self, part: int) -> None:
        """Schedule the next event of a sub-partition, unless an event that is as early has been scheduled."""
        if self.queues[part]:
            at = max(self.queues[part][0][0], self.free[part])
            if at < self.due[part]:
                self.due[part] = at
                heapq.heappush(self.order, (at, part))

    def _again(self, part: int, number: int, when: float) -> None:
        """Schedule a simulated warp to try its next instruction at cycle ``when``."""
        heapq.heappush(self.queues[part], (when, number))
        self._schedule(part)

    def _need(self, warp: _Warp, step: Step, now: float) -> float:
        """Return when the simulated warp can issue its next instruction."""
        need, boards, kind = now, warp.boards, step.kind
        for board in step.wait:
            if boards[board] > need:
                need = boards[board]
        if step.pipe is not None:
            need = max(need, self.pipes[warp.part][step.pipe])
        if kind == Kind.PRODUCT_WAIT:
            while len(warp.groups) > step.amount:
                need = max(need, warp.groups.popleft())
        elif kind == Kind.COPY_WAIT:
            while len(warp.copies) > step.amount:
                need = max(need, warp.copies.popleft())
            if step.amount == 0 and warp.leads:
                need = max(need, self.stored)
        elif kind == Kind.ARRIVAL:
            arrivals = warp.block.arrivals
            if warp.tries < len(arrivals):
                need = max(need, arrivals[warp.tries])
            elif arrivals and not warp.leads:
                need = now + _RETRY
        return need

    def _move(self, now: float, amount: float, cost: float) -> float:
        """Simulate that ``amount`` bytes go through L2, a share of them also through HBM; return when all have arrived.

        The latency comes after the queue: a tile's last byte leaves L2 when all bytes before it have left.
        """
        self.l2 = max(self.l2, now) + amount * cost
        self.hbm = max(self.hbm, now) + amount * self.hbm_cost
        self.busy["l2"] += amount * cost
        self.busy["hbm"] += amount * self.hbm_cost
        return max(self.l2, self.hbm) + self.load_latency

    def _issue(self, warp: _Warp, step: Step, now: float) -> float | None:
        """Issue a simulated instruction; return when the warp is ready again, or None if another event wakes it."""
        part, busy = warp.part, self.busy
        self.free[part] = now + 1
        busy["issue"] += 1
        if step.pipe is not None:
            self.pipes[part][step.pipe] = now + step.cycles
            busy[step.pipe] += step.cycles
        kind = step.kind
        complete = now + step.latency if kind == Kind.PLAIN else self._start(warp, step, now)
        if step.write != NO_SCOREBOARD:
            warp.boards[step.write] = max(warp.boards[step.write], complete if complete > now else now + 20)
        if step.read != NO_SCOREBOARD:
            slow = kind in (Kind.STORE, Kind.SHARED, Kind.COPY)
            reading = self.machine.reaction if kind in (Kind.TMA_LOAD, Kind.TMA_STORE) else 20 if slow else 12
            warp.boards[step.read] = max(warp.boards[step.read], now + reading)
        following = now + step.stall
        warp.at += 1
        if warp.at == len(self.program):
            following = max(following, max(warp.groups, default=0.0))
            self.end = max(self.end, following)
            warp.rounds += 1
            if warp.rounds == self.rounds:
                return None
            # The next block starts when all warps of this block have ended.
            warp.restart()
            if warp.leads:
                warp.block.arrivals = []
            self._wait_for_block(warp, following + self.machine.block_gap - self.machine.reaction)
            return None
        if kind == Kind.BARRIER:
            self._wait_for_block(warp, following)
            return None
        return following

    def _wait_for_block(self, warp: _Warp, since: float) -> None:
        """Let a simulated warp wait at a barrier, and release all warps when the last one arrives."""
        waiting = warp.block.waiting
        waiting.append((warp, since))
        if len(waiting) == warp.block.warps:
            release = max(when for _, when in waiting) + self.machine.reaction
            for other, _ in waiting:
                self._again(other.part, other.number, release)
            waiting.clear()

    def _start(self, warp: _Warp, step: Step, now: float) -> float:
        """Start an instruction's memory access, product or copy, if it has one; return when its result is available."""
        kind, amount, block = step.kind, step.amount, warp.block
        if kind == Kind.SHARED:
            spent = amount / self.machine.shared_rate
            self.shared = max(self.shared, now) + spent
            self.busy["shared"] += spent
            return self.shared + step.latency
        if kind in (Kind.LOAD, Kind.STORE, Kind.COPY):
            arrival = self._move(now, amount, self.lane_cost)
            if kind == Kind.COPY:
                warp.copying = max(warp.copying, arrival)
            return arrival if kind == Kind.LOAD else now + 20
        if kind == Kind.PRODUCT:
            return self._multiply(warp, step, now)
        if kind == Kind.FENCE:
            return now + self.machine.reaction
        if kind == Kind.COPY_COMMIT:
            warp.copies.append(warp.copying)
        elif kind == Kind.ARRIVAL:
            warp.tries += 1
            return now + self.machine.reaction
        elif warp.leads:
            if kind == Kind.EXPECT:
                block.arrivals.append(now)
            elif kind == Kind.TMA_LOAD:
                arrival = self._move(now, amount, self.l2_cost) + self.machine.tma_latency
                if block.arrivals:
                    block.arrivals[-1] = max(block.arrivals[-1], arrival)
            elif kind == Kind.TMA_STORE:
                arrival = self._move(now, amount, self.l2_cost)
                self.stored = arrival + self.machine.tma_latency - self.load_latency
        return now + step.latency

    def _multiply(self, warp: _Warp, step: Step, now: float) -> float:
        """Start a simulated product on the matrix unit; return when it ends."""
        operands, busy = step.amount / self.machine.shared_rate, self.busy
        busy["matrix"] += step.cycles
        busy["operands"] += operands  # read in parallel to other uses of shared memory, without queueing
        spent = max(step.cycles, SUB_PARTITIONS * operands)
        self.matrix_free[warp.part] = max(self.matrix_free[warp.part], now) + spent
        busy["matrix and operands"] += spent
        complete = self.matrix_free[warp.part] + self.machine.reaction
        if step.latency:
            warp.groups.append(complete)
        return complete
