"""Patch embedding: pixels to the tokens of a vision transformer, from all patches of an image or from those kept.

``op`` holds the public function, ``launches`` launches the Triton kernels of ``kernels``, ``cpu`` computes the same
without a GPU, and ``spec`` lists the cases that are checked, measured, tuned and compiled.
"""

from .op import patch_embed

__all__ = ["patch_embed"]
