"""Settings, options and fixtures of all tests.

The same kernel tests run on a CPU (PyTorch paths), with TRITON_INTERPRET=1 (the Triton kernels, interpreted) and on a
GPU.
"""

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

# Workers of pytest-xdist share the cores, so each gets one thread. Torch reads OMP_NUM_THREADS when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

# A plugin of pytest may have imported torch before OMP_NUM_THREADS was set. Processes that tests start read it, and if
# they had another number of threads than this process, their results would differ from its own in the last bits.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The cached indices of test shards must not be put into the user's own cache.
os.environ["CLIPFAST_CACHE"] = tempfile.mkdtemp(prefix="clipfast-cache-")
atexit.register(shutil.rmtree, os.environ["CLIPFAST_CACHE"], ignore_errors=True)

# The processes that tests start find the test modules by the path of the checkout. The first path stays before it:
# where clipfast is not installed, the first path has links to its packages, while the folder clipfast/ of a checkout
# lacks kernels and bench.
sys.path.insert(1, str(Path(__file__).parent.parent))
# With the checkout on the import path, transformers (which OpenCLIP imports if it is installed) would take the
# checkout's folder "kernels" for the Hugging Face package of that name and import it, although it is imported as
# clipfast.kernels already. The second import would register its ops over those that are tested.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

INTERPRET = triton.knobs.runtime.interpret
ON_GPU = torch.cuda.is_available() and not INTERPRET
LEG = "interpreter" if INTERPRET else "gpu" if ON_GPU else "cpu"
# Triton's interpreter multiplies bfloat16 operands as raw bits; on a CPU, tests with the sanitizer cover that dtype.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRET else [torch.bfloat16])


# Under nohup and in some CI, signals are ignored, and processes that a test starts would inherit this. A handler is not
# inherited, so one that does nothing takes the place of an ignored signal.
for _signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1):
    if signal.getsignal(_signum) == signal.SIG_IGN:
        signal.signal(_signum, lambda *_: None)
# With this option of prctl(2), a process whose parent has ended becomes a child of this process, which can then end it.
PR_SET_CHILD_SUBREAPER = 36
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


# Parts of the names of files, classes and tests that take seconds each. --fast leaves them out.
LONG = (
    "TestFailingDisk", "TestSanitized", "TestWhole", "any_number_of_ranks", "as_one_graph", "bench/test_model.py",
    "cli/test_run", "every_character", "imports_nothing", "multiply_alike", "optional_packages", "test_a_command_runs",
    "test_a_step_on_a_cpu", "test_adoption.py", "test_case_by_each_family",
    "test_case_of_several_tiles", "test_distillation_compiled", "test_distributed.py",
    "test_distributed_data_parallel", "test_ema.py", "test_endings.py", "test_every_length", "test_faults.py",
    "test_features.py", "test_forecast.py", "test_fsdp.py", "test_gpu_decoding.py::test_a_run", "test_gpu_driver.py",
    "test_gradcheck", "test_gradient_of_the_bias", "test_gradient_views.py", "test_harness.py", "test_hf_loss.py",
    "test_how_often", "test_in_a_process_of_its_own", "test_inspect.py", "test_launcher.py",
    "test_launches_on_the_stub_driver", "test_locked_training.py", "test_logs.py", "test_memory.py",
    "test_micro_batches.py", "test_no_rank_takes_the_step", "test_offline.py", "test_offsets_beyond_32_bits",
    "test_patches_that_are_laid_out", "test_plan.py", "test_published_towers", "test_readme.py", "test_rectangular",
    "test_remote_sync.py", "test_report.py", "test_runs_of_ids", "test_same_ids_as_open_clip",
    "test_siglip_training.py", "test_spikes.py", "test_step.py::test_the_losses", "test_suites.py", "test_training.py",
    "test_training_data.py", "test_tune.py", "test_two_ranks", "test_validation.py", "test_watch.py",
    "verify/test_others.py", "within_an_epoch",
)  # fmt: skip


class OnlyMeta(TorchDispatchMode):
    """A dispatch mode that fails if an op returns a tensor on another device than "meta".

    A model on "meta" stands for one on a GPU, where an op that makes a tensor on the CPU would copy it to the GPU.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", function
        return out


def pytest_report_header() -> str:
    """Say on which leg of the kernels' verification (CPU, interpreter or GPU) the tests run."""
    return f"clipfast leg: {LEG}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options that clipfast's tests add to pytest."""
    parser.addoption(
        "--update-resources",
        action="store_true",
        help="rewrite the committed resources and numbers of launches of the kernels",
    )
    parser.addoption("--slow", action="store_true", help="run also the sizes that take a CPU minutes")
    parser.addoption("--fast", action="store_true", help="leave out the tests that take seconds each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked slow, unless --slow or a GPU is there, and with --fast also the long tests."""
    fast = config.getoption("--fast")
    left_out = set() if ON_GPU or config.getoption("--slow") else {"slow"}
    left_out |= {"slow", "long"} if fast else set()
    dropped = [
        item
        for item in items
        if any(map(item.get_closest_marker, left_out)) or (fast and any(name in item.nodeid for name in LONG))
    ]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


def pytest_collection_finish() -> None:
    """Freeze the million objects of imported libraries, so that each garbage collection takes half a second less."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python free the imported libraries at its end, since some of them report objects that stay as leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of a kernel test's tensors."""
    return torch.device("cuda" if ON_GPU else "cpu")


def _descendants(pid: int | str, kept: set[int]) -> set[int]:
    """Return the ids of the processes that process ``pid`` has started, and of their children, without ``kept``."""
    found: set[int] = set()
    with contextlib.suppress(OSError):  # the process has ended
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            found |= {int(child) for child in children} - kept
    return found.union(*(_descendants(child, kept) for child in found))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """End every process that a test has started, also if the test failed, except servers that later tests use too."""
    before = _descendants("self", set())
    yield
    for child in multiprocessing.active_children():
        if isinstance(child, multiprocessing.context.ForkServerProcess):
            child.kill()
            child.join()
    workers = {child.pid for child in multiprocessing.active_children()}  # data workers end with their loader
    servers = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    while left := _descendants("self", before | workers | servers):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # Only a child can be waited for. A grandchild soon becomes one, since its parent is killed as well.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed PyTorch, so that a test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use ``count`` threads during a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread in a test, as in the processes that ``run_ranks`` of processes.py starts."""
    with threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let PyTorch use two threads in a test of equal bits, since their partial sums could be added in any order."""
    with threads(2):
        yield


@pytest.fixture
def open_clip_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the configurations that a test adds to those of OpenCLIP when the test ends."""
    factory = pytest.importorskip("open_clip.factory")
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill new memory with NaN, since a result that a kernel forgets to write could hold the right values of an earlier
    test.
    """
    from clipfast.verify.context import poisoned

    with poisoned():
        yield
