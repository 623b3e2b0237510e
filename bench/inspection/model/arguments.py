"""The constant bank of a launch: the sizes of the grid, and the arguments as the driver packs them.

Each tensor gets an address range of its own, so an address that the code computes identifies the tensor. Values in
tensors are known only for tensors of integers, on which Triton kernels branch, and for those that :data:`ASSUMED`
names.
"""

import dataclasses
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .registers import State

FIRST_ARGUMENT = 0x210  # the address in constant bank 0 where the arguments begin, for compute capability 9.0
# A tensor's address is its number times this, so that no two tensors overlap.
REGION = 1 << 44
# Values that are computed on the device, as they are when a model trains, by the name of a kernel's argument. The
# shared shift of the softmax is exact for all scales up to 78.
ASSUMED = {"uses_shared_shift_ptr": 1}
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(b8|u8|u16|u32|u64|s32|s64|f32|f64)\s.*?(?:\[(\d+)\])?,?$")
_BYTES = {"b8": 1, "u8": 1, "u16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Bank:
    """Constant bank 0 of a launch.

    Attributes:
        words: known 32-bit words by address.
        tensors: the name of each argument that is a pointer, and its tensor, by the number of its address range.
    """

    words: Mapping[int, int]
    tensors: Mapping[int, tuple[str, torch.Tensor]]

    def state(self, place: Sequence[int]) -> State:
        """Return the known registers of the first thread of the program at ``place`` in the grid, at its start."""
        special = dict(zip(("SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z"), place, strict=True))
        return State(self.words, special, self.memory)

    def memory(self, address: int, size: int) -> int | None:
        """Return the integer of ``size`` bytes at an address of a simulated kernel, or None if it is unknown."""
        name, tensor = self.tensors.get(address // REGION, ("", None))
        if tensor is None:
            return None
        if name in ASSUMED:
            return ASSUMED[name]
        index = address % REGION // tensor.element_size()
        if tensor.is_floating_point() or tensor.element_size() != size or tensor.device.type != "cpu":
            return None
        flat = tensor.as_strided((tensor.untyped_storage().nbytes() // size - tensor.storage_offset(),), (1,))
        return int(flat[index]) if index < len(flat) else None


def bank(ptx: str, grid: Sequence[int], warps: int, values: Sequence[tuple[str, Any]]) -> Bank:
    """Pack the arguments of a launch as the simulated kernel reads them.

    Args:
        ptx: the PTX of the kernel, which gives the place of each parameter.
        grid: number of programs along each axis.
        warps: the number of warps of a program.
        values: names and values of the arguments that are not constants, in order.

    Raises:
        ValueError: the kernel takes other parameters than these.
    """
    data: dict[int, int] = {}
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for address, value in zip(range(0, 24, 4), (32 * warps, 1, 1, *(*grid, 1, 1)[:3]), strict=True):
        data[address] = value
    pieces = [piece for name, value in values for piece in _pieces(name, value, tensors)]
    places = _parameters(ptx)
    if len(places) < len(pieces):
        raise ValueError(f"the kernel takes {len(places)} parameters, and {len(pieces)} are given")
    # Triton's own parameters, for scratch memory, come after those of the kernel.
    for (address, size), piece in zip(places, pieces, strict=False):
        if piece is not None:
            raw = piece.ljust(-(-size // 4) * 4, b"\0")
            for word in range(-(-size // 4)):
                data[address + 4 * word] = int.from_bytes(raw[4 * word : 4 * word + 4], "little")
    return Bank(data, tensors)


def _parameters(ptx: str) -> list[tuple[int, int]]:
    """Return address and size in bytes of each parameter of the kernel."""
    text = ptx[ptx.index(".entry") :]
    found, address = [], FIRST_ARGUMENT
    for line in text[: text.index("{")].splitlines():
        if match := _PARAMETER.search(line.strip()):
            size = _BYTES[match[2]] * int(match[3] or 1)
            align = int(match[1] or _BYTES[match[2]])
            address = -(-address // align) * align  # aligned relative to the bank, not to the first argument
            found.append((address, size))
            address += size
    return found


def _pieces(name: str, value: Any, tensors: dict[int, tuple[str, torch.Tensor]]) -> list[bytes | None]:
    """Return the kernel parameters for one argument, as bytes; None for a descriptor, which no code computes with."""
    if isinstance(value, TensorDescriptor):
        shape, strides = value.shape, value.strides
        return [None, *(struct.pack("<i", size) for size in shape), *(struct.pack("<q", step) for step in strides)]
    if isinstance(value, torch.Tensor):
        number = len(tensors) + 1
        tensors[number] = (name, value)
        return [struct.pack("<Q", number * REGION + value.data_ptr() % 16)]
    if isinstance(value, bool | int):
        return [struct.pack("<Q", value % 2**64)]
    return [struct.pack("<f", value)]
