"""The published kernels of other packages, as those packages would launch them on a GPU that need not be there.

The packages are not part of this repository; they are used where they are installed. The public function of such a peer
is called on CPU tensors that claim to be on a GPU of the architecture, and its launches are recorded, with the tiles,
warps and stages that it chooses itself.
"""

import importlib.util
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from clipfast.kernels.launch import Launch

from .shipped import Case


def _features(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = (torch.ones(1024, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    return image, text


def _memeff(dim: int) -> None:
    from memeff import MemoryEfficientCLIPLoss  # type: ignore[import-not-found]

    MemoryEfficientCLIPLoss(normalized_inputs=True)(*_features(dim)).backward()


def _inf_cl(dim: int) -> None:
    from inf_cl import cal_flash_loss  # type: ignore[import-not-found]

    cal_flash_loss(*_features(dim), scale=10.0).mean().backward()


# By the module to import: name and version for pip, and calls by case name. They are the forward and backward passes of
# contrastive losses on 1,024 pairs in bfloat16.
PEERS: dict[str, tuple[str, dict[str, Case]]] = {
    # 1280, the features of bigG/14, are more than its backward in the style of FlashAttention takes
    "memeff": ("memeff==0.3.1", {f"memeff N1024 D{d} bf16": partial(_memeff, d) for d in (512, 768, 1280)}),
    "inf_cl": ("inf-cl==1.2.1", {f"inf-cl N1024 D{d} bf16": partial(_inf_cl, d) for d in (512, 768)}),
}


def installed_cases() -> tuple[dict[str, Case], list[str]]:
    """Return the cases of the peers that are installed, and one line for each peer that is not."""
    cases: dict[str, Case] = {}
    missing = []
    for module, (requirement, calls) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            missing.append(f"{module} is missing: pip install --no-deps {requirement}")
        else:
            cases |= calls
    return cases, missing


def record_peer(arch: int, case: Case) -> list[Launch]:
    """Record the launches of a peer on compute capability ``arch``, each distinct one once.

    Raises:
        Exception: anything that the peer raises, such as ImportError for a dependency that is missing.
    """
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        constexprs = {name: value for name, value in given.items() if name in constant}
        named = {name: value for name, value in given.items() if name not in constant}
        launches.append(Launch(kernel, grid if isinstance(grid, tuple) else (), named, constexprs, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(arch, 10)),
        mock.patch.object(torch.Tensor, "is_cuda", True),
    ):
        case()
    distinct = {(launch.kernel.__name__, str(launch.constexprs), str(launch.options)): launch for launch in launches}
    return list(distinct.values())
