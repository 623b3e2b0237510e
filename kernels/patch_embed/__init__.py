"""Patch embedding: pixels to the tokens of a vision transformer, from all patches of an image or from those kept.

``op`` holds the public function. ``launches`` launches the Triton kernels of ``kernels``, and ``matrix`` those of
``matrix_kernels``, for GPUs with tensor descriptors. ``fold`` folds the normalisation of bytes into the weight. ``cpu``
computes the same on a CPU, and ``spec`` lists the cases that are checked, measured, tuned and compiled.
"""

from .op import patch_embed

__all__ = ["patch_embed"]
