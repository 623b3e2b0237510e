"""Kernels without a body, for checks that concern only what the host does.

What the launcher packs depends on a kernel's signature, its configuration and how its arguments are specialised, and
not on what the kernel computes. Without a body it compiles in a tenth of the time, so that all odd shapes and layouts
of all ops can be launched. The box and the swizzle of a tensor map do depend on the body: the shipped shapes are
launched with it, and odd shapes are as well by ``python -m bench.stub --whole``.
"""

import functools
from typing import Any

from triton.runtime.jit import JITFunction


@functools.cache
def without_body(kernel: Any) -> Any:
    """Return a kernel with the name and the parameters of ``kernel`` that does nothing."""
    copy: Any = JITFunction(kernel.fn)
    copy.params = kernel.params
    parameters = [f"{p.name}: tl.constexpr" if p.is_constexpr else p.name for p in kernel.params]
    copy._unsafe_update_src(f"def {kernel.__name__}({', '.join(parameters)}):\n    return\n")
    return copy
