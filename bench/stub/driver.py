"""Load the stub driver into this process, so that Triton's own launcher launches on GPUs that do not exist.

CPU tensors stand for those of a GPU (:func:`clipfast.kernels.launch.stand_in`). Kernels are compiled for its
architecture and passed to the launcher, which packs their arguments and encodes tensor maps as for a real driver. The
stub checks these calls by the rules of the real driver, and runs no kernel. A call that breaks a rule raises Triton's
own RuntimeError with the rule.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource

from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import stand_in

from .build import build

MAX_PARAMS, MAX_PARAM_BYTES = 128, 4096
DEVICES = 2
VARIABLE = "CLIPFAST_STUB_GPU"


def gpu_numbers(arch: int, devices: int = DEVICES) -> str:
    """Return the value of :data:`VARIABLE`, the environment variable that tells the stub the numbers of its GPUs."""
    limits = ARCHITECTURES[arch]
    numbers = (arch, devices, limits.multiprocessors, limits.block_shared_bytes, limits.shared_bytes, limits.registers)
    return " ".join(map(str, numbers))


class LastLaunch(ctypes.Structure):
    """The last launch as the stub driver received it: the struct ``StubLaunch`` of gpu.h."""

    _fields_ = (
        ("name", ctypes.c_char * 256), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_int), ("registers", ctypes.c_int), ("device", ctypes.c_int), ("num_params", ctypes.c_int),
        ("stream", ctypes.c_uint64), ("offsets", ctypes.c_int * MAX_PARAMS), ("sizes", ctypes.c_int * MAX_PARAMS),
        ("bytes", ctypes.c_ubyte * MAX_PARAM_BYTES),
    )  # fmt: skip

    def parameters(self) -> list[bytes]:
        """Return the bytes of each parameter of the kernel that the stub launched last."""
        held = bytes(self.bytes)
        places = zip(self.offsets[: self.num_params], self.sizes[: self.num_params], strict=True)
        return [held[offset : offset + size] for offset, size in places]


class TensorMap(ctypes.Structure):
    """The fields that the stub driver writes into a tensor map: the struct ``StubMap`` of gpu.h."""

    _fields_ = (
        ("magic", ctypes.c_uint64), ("unused", ctypes.c_uint64), ("base", ctypes.c_uint64),
        ("last", ctypes.c_uint32 * 5),
        ("box", ctypes.c_uint16 * 5), ("element_bytes", ctypes.c_uint16), ("strides", ctypes.c_uint64 * 4),
        ("rank", ctypes.c_uint8), ("swizzle", ctypes.c_uint8),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    """The numbers of calls that the stub driver has accepted and refused."""

    launches: int
    maps: int
    refused: int


class Stub:
    """The stub driver's library, the streams of its devices, and the answers to questions about the current device."""

    def __init__(self, library: ctypes.CDLL, arch: int) -> None:
        self.library, self.arch = library, arch
        for name in ("stub_launches", "stub_maps", "stub_refused"):
            getattr(library, name).restype = ctypes.c_long
        library.stub_own.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int)
        library.stub_new_stream.restype = ctypes.c_void_p
        library.stub_begin_capture.argtypes = library.stub_end_capture.argtypes = (ctypes.c_void_p,)
        library.stub_last_launch.restype = ctypes.POINTER(LastLaunch)
        library.stub_message.restype = ctypes.c_char_p
        library.cuMemAlloc_v2.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self.streams = [int(library.stub_new_stream(device)) for device in range(DEVICES)]

    @property
    def counts(self) -> Counts:
        """The numbers of launches and tensor maps that the stub has accepted, and of calls that it has refused."""
        found = (getattr(self.library, f"stub_{name}")() for name in ("launches", "maps", "refused"))
        return Counts(*map(int, found))

    @property
    def message(self) -> str:
        """The rule that was broken by the last launch or call that the stub refused."""
        return str(self.library.stub_message().decode())

    @property
    def last(self) -> LastLaunch:
        """The last launch that the stub has accepted."""
        launch: LastLaunch = self.library.stub_last_launch().contents
        return launch

    def own(self, tensors: list[torch.Tensor], device: int) -> None:
        """Declare to the stub that the memory of ``tensors``, and no other memory, belongs to ``device``."""
        self.library.stub_disown_all()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.library.stub_own(storage.data_ptr(), storage.nbytes(), device)

    def current_device(self) -> int:
        """Return the stub's current device, or the first one if none is current."""
        return max(0, int(self.library.stub_current_device()))

    def exchange_device(self, device: int) -> int:
        """Make ``device`` the stub's current one and return the previous one; a negative number changes nothing."""
        if device < 0:
            return -1
        before = self.current_device()
        self.library.stub_set_device(device)
        return before

    def stream_of(self, device: int) -> int:
        """Return the stream on which kernels of the stub's ``device`` start."""
        return self.streams[device]

    @contextlib.contextmanager
    def capturing(self, device: int) -> Iterator[None]:
        """Let the stub capture the stream of ``device``, as a CUDA graph does."""
        self.library.stub_begin_capture(self.streams[device])
        try:
            yield
        finally:
            self.library.stub_end_capture(self.streams[device])


@functools.cache
def load(arch: int) -> Stub:
    """Make the stub Triton's driver for the rest of this process, with GPUs of ``arch`` (90 for sm_90).

    Raises:
        RuntimeError: gcc is missing, or the process has a driver already.
    """
    known = os.environ.setdefault(VARIABLE, gpu_numbers(arch))
    if known != gpu_numbers(arch):
        raise RuntimeError(f"this process pretends to have GPUs of another kind than sm_{arch}: start a new one")
    folder = build()
    stub = Stub(ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL), arch)
    triton.knobs.nvidia.libcuda_path = str(folder)
    with mock.patch.object(torch.cuda, "current_device", stub.current_device):
        driver = CudaDriver()
    driver.get_current_device = stub.current_device
    driver.set_current_device = stub.exchange_device
    driver.get_current_stream = stub.stream_of
    driver.get_device_capability = lambda _=0: divmod(arch, 10)
    driver.get_active_torch_device = lambda: torch.device("cpu")
    triton.runtime.driver.set_active(driver)
    _share_cache()
    return stub


def _share_cache() -> None:
    """Let the launcher use the kernels in Triton's cache that the offline compiler has compiled.

    Both compile the same kernels. But the launcher also passes an empty list of attributes for each argument without
    attributes, so Triton's cache would treat the two as different kernels.
    """
    initialise = ASTSource.__init__

    def without_empty(source: Any, fn: Any, signature: Any, constexprs: Any = None, attrs: Any = None) -> None:
        """Initialise Triton's source of a kernel without its empty attributes, so the stub finds it in the cache."""
        known = {path: found for path, found in (attrs or {}).items() if found}
        initialise(source, fn, signature, constexprs, known)

    ASTSource.__init__ = without_empty


@contextlib.contextmanager
def on_device(stub: Stub, device: int = 0, *, current: int = 0) -> Iterator[None]:
    """Let CPU tensors stand for tensors of the stub's ``device`` while device ``current`` is the current one."""
    patches = {"_exchange_device": stub.exchange_device, "_maybe_exchange_device": stub.exchange_device}
    limits = ARCHITECTURES[stub.arch]
    with contextlib.ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stub.library.stub_set_device(current)
        stack.enter_context(stand_in(torch.device("cuda", device), stub.arch, limits.multiprocessors))
        yield
        if stub.current_device() != current:
            raise RuntimeError(f"device {stub.current_device()} is current after a call, device {current} was before")


def tensors_of(arguments: Any) -> list[torch.Tensor]:
    """Return the tensors among the arguments of a kernel on the stub, and those that tensor descriptors describe."""
    bases = (getattr(value, "base", value) for value in arguments)
    return [value for value in bases if isinstance(value, torch.Tensor)]
