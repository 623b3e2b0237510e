"""Text embedding: token ids and positions to tokens, in one pass.

``op`` holds the public function, ``launches`` launches the Triton kernels of ``kernels``, ``cpu`` computes the same
without a GPU, and ``spec`` lists the cases that are checked, measured, tuned and compiled.
"""

from .op import text_embed

__all__ = ["text_embed"]
