"""The bytes that a launch moves from and to device memory, from the tensors that it is given.

A tensor that the kernel loads is read once, and one that it stores is written once: data that several programs load is
assumed to stay in L2. Triton's intermediate code shows which tensors these are: an argument is loaded or stored if the
pointer of a load or a store is computed from it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

# Triton prints its code in MLIR's short form, or in the long one: %x = tt.load %p : ... or %x = "tt.load"(%p) : ...
_OP = re.compile(r'\s*(?:(%\w+)(?::\d+)?(?:, %\w+)* = )?"?([a-z_]+\.[\w.]+)"?(.*)')
_FUNCTION = re.compile(r"\s*(?:tt\.func [^(]*|\^bb0)\((.*)")
_LOADS, _STORES = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather"), ("tt.store", "tt.descriptor_store",
                                                                              "tt.descriptor_reduce")  # fmt: skip
_BOTH = ("tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_reduce")


def used(ttir: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return from a kernel's TTIR the names of the arguments that it loads from, and of those that it stores to."""
    origins: dict[str, frozenset[str]] = {}
    loads: set[str] = set()
    stores: set[str] = set()
    bounds: list[str] = []  # the operands of the loop whose body begins on the next line
    for line in ttir.splitlines():
        if begin := _FUNCTION.match(line):
            names = re.findall(r"(%\w+): ", begin[1])
            if not origins:  # the kernel's own arguments
                origins = {name: frozenset((name.lstrip("%"),)) for name in names}
            for name, operand in zip(names[1:], bounds[3:], strict=False):  # loop-carried values
                origins[name] = origins.get(operand, frozenset())
            continue
        op = _OP.match(line)
        if op is None:
            continue
        result, name, rest = op.groups()
        operands = re.findall(r"%\w+", rest.split(" : ")[0])
        if name in (*_LOADS, *_BOTH):
            loads |= origins.get(operands[0], frozenset())
        if name in (*_STORES, *_BOTH):
            stores |= origins.get(operands[0], frozenset())
        for inner, outer in re.findall(r"(%\w+) = (%\w+)", rest):  # MLIR prints loop variables as iter_args(%x = %y)
            origins[inner] = origins.get(outer, frozenset())
        if result and name not in _LOADS:
            origins[result] = frozenset().union(*(origins.get(operand, frozenset()) for operand in operands))
        bounds = operands if name == "scf.for" else []
    return frozenset(loads), frozenset(stores)


def moved_bytes(ttir: str, arguments: Mapping[str, Any]) -> int:
    """Return the bytes that a launch reads and writes: those of all tensors that it loads and all that it stores."""
    total = 0
    for names in used(ttir):
        tensors = {}
        for name in names:
            value = arguments.get(name)
            tensor = getattr(value, "base", value)
            if isinstance(tensor, torch.Tensor):
                place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)
                tensors[place] = tensor.nbytes
        total += sum(tensors.values())
    return total
