"""Patch embedding of images of several sizes whose patches lie behind one another, with positions from a grid.

``op`` holds the public function, ``launches`` starts the Triton kernel of ``kernels``, ``cpu`` computes the same in
PyTorch, and ``spec`` lists the cases that are checked, measured, tuned and compiled.
"""

from .op import patch_embed_packed

__all__ = ["patch_embed_packed"]
