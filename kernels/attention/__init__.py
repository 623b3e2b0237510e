"""Softmax attention at CLIP's lengths.

``op`` holds the ops, ``launches`` decides which kernels serve a shape, and ``calls`` starts them. The kernels in
``short`` and ``unrolled`` hold a whole head at once, those in ``looped`` take a head block by block, and those in
``varlen`` serve packed sequences. ``tiles`` has the functions that all kernels share, ``cpu`` computes attention on a
CPU, and ``spec`` lists the cases that are checked and measured.
"""

from .launches import Route, attention_route
from .op import attention, attention_qkv

__all__ = ["Route", "attention", "attention_qkv", "attention_route"]
