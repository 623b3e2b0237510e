"""Softmax attention at CLIP's lengths.

``op`` holds the ops, and ``launches`` decides which kernels serve a shape. The kernels in ``short`` and ``unrolled``
hold a whole head at once, and the kernels in ``looped`` walk it block by block. ``tiles`` has the functions that all of
them share, ``cpu`` computes attention without a GPU, and ``spec`` lists the cases that are checked and measured.
"""

from .launches import Route, attention_route
from .op import attention, attention_qkv

__all__ = ["Route", "attention", "attention_qkv", "attention_route"]
