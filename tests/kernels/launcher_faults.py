"""Plant faults in launches on the stub driver, and print as JSON the faults that the stub does not catch.

``test_launcher.py`` runs this program in a process of its own, because the stub replaces the driver of its process.
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
from clipfast.bench.stub.arguments import checked_launches
from clipfast.bench.stub.capture import CaptureRules
from clipfast.bench.stub.driver import load, on_device
from clipfast.kernels import launch
from clipfast.kernels.configs import KernelConfig
from clipfast.kernels.spec import Draw, specs

STUB = load(int(sys.argv[1]))
FAULTS = {}  # by name: a part of the expected error, a function that makes the fault, and whether it chooses a device


def fault(message, has_device=False):
    """Register a planted fault of a kernel launch by its function's name; the error must contain ``message``."""

    def register(function):
        """Add a planted fault of a kernel launch to the table."""
        FAULTS[function.__name__] = message, function, has_device
        return function

    return register


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Copy a vector: the kernel whose launches get planted faults."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


def compiled_copy():
    """Return the compiled copy kernel, which has been launched once without a fault, and its arguments."""
    x = torch.zeros(1000)
    y = torch.zeros(1000)
    return _copy_kernel[(1,)](x, y, 1000, BLOCK=1024), (x, y)


def plan_of_copy():
    """Return a plan of the copy kernel, which starts it without a fault."""
    config = KernelConfig(num_warps=4, num_stages=2)
    return launch.Plan(_copy_kernel, (1,), 1000, config=config, device=torch.device("cpu"), BLOCK=1024)


def encode(*, base=0, box=(128, 64), shape=(500, 512), strides=(512, 1)):
    """Encode a tensor map for a kernel in bf16 by Triton's own code; without arguments the map is valid."""
    x = torch.zeros(500 * 512 + 64, dtype=torch.bfloat16)
    STUB.own([x], 0)
    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    swizzle, bf16 = 3, 9  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    fill(x.data_ptr() + base, swizzle, x.itemsize, bf16, list(box), list(shape), list(strides), 0)


MAPS = (
    ("the base is not aligned to 16 bytes", {"base": 8}),
    ("box dimension 1 is 257", {"box": (257, 64)}),
    ("the inner box of 256 bytes is wider than its swizzle of 128", {"box": (64, 128)}),
    ("the inner box of 24 bytes is no multiple of 16", {"box": (64, 12)}),
    ("stride 1008 is below its row of 1024 bytes", {"strides": (504, 1)}),
    ("stride 1032 must be a multiple of 16", {"strides": (516, 1)}),
    ("stride 1099511627776 must be a multiple of 16 below 2^40", {"strides": (2**39, 1)}),
    ("dimension 1 is 0", {"shape": (0, 512)}),
    ("it reaches 896 bytes past its tensor", {"shape": (501, 512)}),
)
for number, (expected, changed) in enumerate(MAPS):
    FAULTS[f"tensor map {number}"] = expected, functools.partial(encode, **changed), False


@fault("grid (1, 65536, 1), allowed (2147483647, 65535, 65535)")
def grid_y_over_65535():
    """Launch a kernel with more programs in y than a GPU can start."""
    x = torch.zeros(1000)
    _copy_kernel[(1, 65536)](x, torch.zeros(1000), 1000, BLOCK=1024)


@contextlib.contextmanager
def packed(**changed):
    """Let the launcher start the copy kernel with another number of warps, blocks of a cluster or shared bytes."""
    kernel, _ = compiled_copy()
    before = kernel.packed_metadata
    kernel.packed_metadata = tuple((dict(zip(("warps", "blocks", "shared"), before, strict=True)) | changed).values())
    try:
        yield
    finally:
        kernel.packed_metadata = before


@fault("256 threads per block, 128 allowed")
def threads_over_the_kernels():
    """Launch a kernel with more threads than it was compiled for."""
    with packed(warps=8):
        compiled_copy()


@fault("60000 bytes of shared memory, 49152 allowed")
def shared_memory_without_the_attribute():
    """Launch a kernel with more than 48 KiB of shared memory, which needs an attribute that is not set."""
    with packed(shared=60000):
        compiled_copy()


@fault("300000 bytes of shared memory, 232448 allowed on sm_90")
def shared_memory_over_the_limit():
    """Launch a kernel with more shared memory than its GPU has."""
    kernel, _ = compiled_copy()
    attribute, too_much = 8, 300000  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if STUB.library.cuFuncSetAttribute(ctypes.c_void_p(kernel.function), attribute, too_much):
        raise RuntimeError(STUB.message)


@fault("cannot be accessed from Triton (cpu tensor?)")
def pointer_of_a_cpu_tensor():
    """Launch a kernel with a pointer to a CPU tensor."""
    x, y = torch.zeros(1000), torch.zeros(1000)
    with mock.patch.object(type(STUB), "own"):
        STUB.library.stub_disown_all()
        STUB.library.stub_own(x.data_ptr(), x.nbytes, 0)
        _copy_kernel[(1,)](x, y, 1000, BLOCK=1024)


@fault("x_ptr reached the driver as")
def arguments_in_another_order():
    """Launch a kernel with two of its arguments exchanged."""
    call = CudaLauncher.__call__

    def swapped(self, *args):
        """Launch a kernel with two pointers exchanged."""
        call(self, *args[:9], args[10], args[9], *args[11:])

    with mock.patch.object(CudaLauncher, "__call__", swapped):
        compiled_copy()


@fault("compiled for multiples of 16")
def compiled_for_more_alignment():
    """Launch a kernel that was compiled for addresses with more alignment."""
    aligned, _ = compiled_copy()
    x = torch.zeros(1001)[1:]
    cache = _copy_kernel.device_caches[0][0]
    with mock.patch.dict(cache):
        # Triton's cache now returns the kernel that was compiled for aligned pointers, whatever the arguments are.
        cache.update(dict.fromkeys(cache, aligned))
        compiled_for_any = mock.MagicMock()
        compiled_for_any.get.return_value = aligned
        caches = _copy_kernel.device_caches[0]
        with mock.patch.dict(_copy_kernel.device_caches, {0: (compiled_for_any, *caches[1:])}):
            _copy_kernel[(1,)](x, torch.zeros(1000), 1000, BLOCK=1024)


@fault("a plan started")
def plan_with_addresses_in_another_order():
    """Start a kernel by a plan that exchanges the addresses of its tensors."""
    plan = plan_of_copy()
    bind = launch._bind

    def swapped(tensors):
        """Return the addresses of a kernel's tensors in reverse order."""
        key, addresses = bind(tensors)
        return key, addresses[::-1]

    with mock.patch.object(launch, "_bind", swapped):
        plan.start(torch.zeros(1000), torch.zeros(1000))


@fault("a start passed")
def start_with_addresses_in_another_order():
    """Start a kernel by its plan with the addresses of its tensors in reverse order."""
    plan = plan_of_copy()
    at = launch.Start.at
    with mock.patch.object(launch.Start, "at", lambda start, *addresses: at(start, *addresses[::-1])):
        plan.start(torch.zeros(1000), torch.zeros(1000))


@fault("a plan has two kernels for")
def plan_that_forgets_alignment():
    """Start a kernel by a plan that takes the same compiled kernel for aligned and for unaligned addresses."""
    plan = plan_of_copy()
    bind, x = launch._bind, torch.zeros(1001)
    with mock.patch.object(launch, "_bind", lambda tensors: ((torch.float32,) * 2, bind(tensors)[1])):
        plan.start(x[1:], torch.zeros(1000))
        plan.start(x[:1000], torch.zeros(1000))


def an_op():
    """Call an op on the stub forward and backward at its small shape."""
    spec = specs()["bias_gelu"]
    walk._run(spec, spec.call(spec.small[0], "", Draw(), torch.bfloat16))


def on_the_other_device(run):
    """Call the launches of ``run`` with tensors of device 1 while device 0 is current."""
    with on_device(STUB, 1, current=0), checked_launches(STUB, 1, emptied=True):
        run()


@fault("argument 0 is memory of device 1, the current is 0", has_device=True)
def no_device_guard():
    """Launch a kernel on a device that is not made current."""
    with mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()):
        on_the_other_device(an_op)


@fault("device 1 is current after a call, device 0 was before", has_device=True)
def guard_that_does_not_return():
    """Launch a kernel with a device guard that does not make the earlier device current again."""

    class Guard(torch.cuda.device):
        def __exit__(self, *error):
            return False

    with mock.patch.object(torch.cuda, "device", Guard):
        on_the_other_device(an_op)


@contextlib.contextmanager
def capture():
    """Capture the stream of device 0 in this context, as for a CUDA graph."""
    with STUB.capturing(0), CaptureRules():
        yield


@fault("a constant is copied from the host")
def copy_from_the_host_in_capture():
    """Copy from the host while a CUDA graph of kernels is captured."""
    x = torch.zeros(10)
    with capture():
        x + torch.tensor(2.0)


@fault("waits for the GPU while a graph is captured")
def value_read_by_the_host_in_capture():
    """Read a value on the host while a CUDA graph of kernels is captured."""
    x = torch.zeros(10)
    with capture():
        x.sum().item()


@fault("a kernel is loaded while a stream is captured")
def kernel_loaded_in_capture():
    """Load a kernel while a CUDA graph is captured."""
    x = torch.zeros(1000)
    with capture():
        _copy_kernel[(1,)](x, x, 1000, BLOCK=256)


def raised_by(plant, context):
    """Return the text of the error that a planted fault of a kernel launch raises, or an empty text."""
    try:
        with context:
            plant()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main():
    """Print the number of planted faults of kernel launches, and each that was not caught with the expected error."""
    wrong = {}
    with on_device(STUB):
        wrong["nothing"] = raised_by(encode, checked_launches(STUB))
    for name, (message, plant, has_device) in FAULTS.items():
        with contextlib.nullcontext() if has_device else on_device(STUB):
            raised = raised_by(plant, contextlib.nullcontext() if has_device else checked_launches(STUB))
        if message not in raised:
            wrong[name] = raised or "nothing was raised"
    print(json.dumps({name: raised for name, raised in wrong.items() if raised}), len(FAULTS))


if __name__ == "__main__":
    main()
