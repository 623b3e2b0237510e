"""The contrastive losses: logits in blocks, their sums and their gradients, and the losses made of them.

``loss`` holds the op. ``stats`` is what it knows of rows and columns; the work on blocks of logits has one interface
(``blocks``) and two implementations, ``launches`` of the Triton kernels in ``tiles``, and ``cpu``.
"""

from .loss import contrastive_loss

__all__ = ["contrastive_loss"]
