"""Patch embedding of packed images: images of several sizes, whose patches follow one another in one tensor.

``op`` holds the public function, ``launches`` starts the Triton kernel of ``kernels``, ``cpu`` computes the same in
PyTorch, and ``spec`` lists the cases that are checked, measured, tuned and compiled.
"""

from .op import patch_embed_packed

__all__ = ["patch_embed_packed"]
