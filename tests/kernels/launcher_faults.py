"""Faults planted for the stub driver, each launched in this process; prints by name what was raised, as JSON.

``test_launcher.py`` runs it, because the stub driver takes over the driver of the process that loads it.
"""

import contextlib
import ctypes
import functools
import json
import sys
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.driver import CudaLauncher

from clipfast.bench.stub import walk
from clipfast.bench.stub.arguments import watched
from clipfast.bench.stub.capture import CaptureRules
from clipfast.bench.stub.driver import load, on_device
from clipfast.kernels.spec import Draw, specs

STUB = load(int(sys.argv[1]))
FAULTS = {}


def fault(function):
    """Register a planted fault, under the name of its function."""
    FAULTS[function.__name__] = function
    return function


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _device_map_kernel(x_ptr, y_ptr, M, N):
    # a tensor map that the kernel makes itself needs memory, which Triton allocates for each launch
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [16, 64])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [16, 64])
    y.store([0, 0], x.load([0, 0]))


def compiled_copy():
    """The compiled kernel, launched once without a fault, with its arguments."""
    x = torch.zeros(1000)
    y = torch.zeros(1000)
    return _copy_kernel[(1,)](x, y, 1000, BLOCK=1024), (x, y)


def encode(*, base=0, box=(128, 64), shape=(500, 512), strides=(512, 1)):
    """Encode a tensor map in bf16 by Triton's own code; without arguments it is a legal one."""
    x = torch.zeros(500 * 512 + 64, dtype=torch.bfloat16)
    STUB.own([x], 0)
    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    swizzle, bf16 = 3, 9  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    fill(x.data_ptr() + base, swizzle, x.itemsize, bf16, list(box), list(shape), list(strides), 0)


FAULTS["nothing"] = encode
FAULTS["misaligned_base"] = functools.partial(encode, base=8)
FAULTS["box_over_256"] = functools.partial(encode, box=(257, 64))
FAULTS["box_of_nothing"] = functools.partial(encode, box=(0, 64))
FAULTS["inner_box_wider_than_swizzle"] = functools.partial(encode, box=(64, 128))
FAULTS["inner_box_of_no_whole_16_bytes"] = functools.partial(encode, box=(64, 12))
FAULTS["box_over_shared_memory"] = functools.partial(
    encode, box=(8, 256, 64), shape=(9, 9, 512), strides=(8192, 512, 1)
)
FAULTS["stride_below_row"] = functools.partial(encode, strides=(504, 1))
FAULTS["stride_of_zero"] = functools.partial(encode, strides=(0, 1))
FAULTS["stride_of_no_whole_16_bytes"] = functools.partial(encode, strides=(516, 1))
FAULTS["stride_of_2_to_40"] = functools.partial(encode, strides=(2**39, 1))
FAULTS["dimension_of_zero"] = functools.partial(encode, shape=(0, 512))
FAULTS["map_past_its_tensor"] = functools.partial(encode, shape=(501, 512))


@fault
def grid_y_over_65535():
    x = torch.zeros(1000)
    _copy_kernel[(1, 65536)](x, torch.zeros(1000), 1000, BLOCK=1024)


@contextlib.contextmanager
def packed(**changed):
    """The kernel launched with other numbers of warps, blocks of a cluster or bytes of shared memory than it has."""
    kernel, _ = compiled_copy()
    before = kernel.packed_metadata
    kernel.packed_metadata = tuple((dict(zip(("warps", "blocks", "shared"), before, strict=True)) | changed).values())
    try:
        yield
    finally:
        kernel.packed_metadata = before


@fault
def threads_over_the_kernels():
    with packed(warps=8):
        compiled_copy()


@fault
def threads_over_1024():
    with packed(warps=64):
        compiled_copy()


@fault
def shared_memory_without_the_attribute():
    with packed(shared=60000):
        compiled_copy()


@fault
def shared_memory_over_the_limit():
    kernel, _ = compiled_copy()
    attribute, too_much = 8, 300000  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if STUB.library.cuFuncSetAttribute(ctypes.c_void_p(kernel.function), attribute, too_much):
        raise RuntimeError(STUB.message)


@fault
def registers_over_the_limit():
    kernel, _ = compiled_copy()
    registers = ctypes.c_int.from_address(kernel.function + 256)  # behind the name: see StubKernel in gpu.h
    before, registers.value = registers.value, 600
    try:
        compiled_copy()
    finally:
        registers.value = before


@fault
def pointer_of_a_cpu_tensor():
    x, y = torch.zeros(1000), torch.zeros(1000)
    with mock.patch.object(type(STUB), "own"):
        STUB.library.stub_disown_all()
        STUB.library.stub_own(x.data_ptr(), x.nbytes, 0)
        _copy_kernel[(1,)](x, y, 1000, BLOCK=1024)


@fault
def arguments_in_another_order():
    call = CudaLauncher.__call__

    def swapped(self, *args):
        call(self, *args[:9], args[10], args[9], *args[11:])

    with mock.patch.object(CudaLauncher, "__call__", swapped):
        compiled_copy()


@fault
def scalar_of_another_value():
    call = CudaLauncher.__call__

    def changed(self, *args):
        call(self, *args[:11], 999, *args[12:])

    with mock.patch.object(CudaLauncher, "__call__", changed):
        compiled_copy()


@fault
def compiled_for_more_alignment():
    aligned, _ = compiled_copy()
    x = torch.zeros(1001)[1:]
    cache = _copy_kernel.device_caches[0][0]
    with mock.patch.dict(cache):
        # the launcher finds the kernel of aligned pointers for any arguments
        cache.update(dict.fromkeys(cache, aligned))
        compiled_for_any = mock.MagicMock()
        compiled_for_any.get.return_value = aligned
        caches = _copy_kernel.device_caches[0]
        with mock.patch.dict(_copy_kernel.device_caches, {0: (compiled_for_any, *caches[1:])}):
            _copy_kernel[(1,)](x, torch.zeros(1000), 1000, BLOCK=1024)


def an_op(name="bias_gelu"):
    """Call an op forward and backward at its small shape."""
    spec = specs()[name]
    walk._run(spec, spec.call(spec.small[0], "", Draw(), torch.bfloat16))


def on_the_other_device(run):
    """Call ``run`` with tensors of device 1 while device 0 is current."""
    with on_device(STUB, 1, current=0), watched(STUB, 1, emptied=True):
        run()


def no_device_guard():
    with mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()):
        on_the_other_device(an_op)


def guard_that_does_not_return():
    class Guard(torch.cuda.device):
        def __exit__(self, *error):
            return False

    with mock.patch.object(torch.cuda, "device", Guard):
        on_the_other_device(an_op)


@contextlib.contextmanager
def capture():
    """A stream of device 0 that is captured."""
    with STUB.capturing(0), CaptureRules():
        yield


@fault
def copy_from_the_host_in_capture():
    x = torch.zeros(10)
    with capture():
        x + torch.tensor(2.0)


@fault
def value_read_by_the_host_in_capture():
    x = torch.zeros(10)
    with capture():
        x.sum().item()


@fault
def size_read_by_the_host_in_capture():
    x = torch.zeros(10)
    with capture():
        x[x > 0]


@fault
def op_that_reads_in_capture():
    # within an op of ours, which PyTorch shows as one
    launch = sys.modules["clipfast.kernels.activation"].launch

    def reads(kernel, grid, x, *args, **options):
        x.sum().item()
        launch(kernel, grid, x, *args, **options)

    an_op()
    with mock.patch("clipfast.kernels.activation.launch", reads), capture():
        an_op()


@fault
def kernel_loaded_in_capture():
    x = torch.zeros(1000)
    with capture():
        _copy_kernel[(1,)](x, x, 1000, BLOCK=256)


class Memory:
    """Memory that the driver allocates."""

    def __init__(self, size, align, stream):
        pointer = ctypes.c_uint64()
        if STUB.library.cuMemAlloc_v2(ctypes.byref(pointer), size):
            raise RuntimeError(STUB.message)
        self.pointer = pointer.value
        self.size = size

    def data_ptr(self):
        return self.pointer


@fault
def allocation_in_capture():
    x, y = torch.zeros(16, 64), torch.zeros(16, 64)
    triton.set_allocator(Memory)
    _device_map_kernel[(1,)](x, y, 16, 64)
    with capture():
        _device_map_kernel[(1,)](x, y, 16, 64)


def raised_by(plant, context):
    """What ``plant`` raises in ``context``; None if it raises nothing."""
    try:
        with context:
            plant()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    """Print what each fault raises."""
    found = {}
    for name, plant in FAULTS.items():
        with on_device(STUB):
            found[name] = raised_by(plant, watched(STUB))
    for plant in (no_device_guard, guard_that_does_not_return):
        found[plant.__name__] = raised_by(plant, contextlib.nullcontext())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
