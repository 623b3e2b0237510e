"""The contrastive losses: logits are computed in blocks, and the whole matrix of logits is never in memory.

``contrastive``, ``sigmoid`` and ``nce`` hold the losses: equations, public functions, registration. ``distributed`` has
the loss of a batch that is spread over processes, and ``exchange`` the messages of these processes. All losses use
``shared`` (checks of arguments, gradients) and ``stats`` (pairs, vectors of maxima and sums).

``launches`` launches the kernels in ``softmax_kernels`` and ``kernels``, in blocks whose sizes ``block_sizes`` chooses.
``tiles`` has the Triton functions that the kernels share. ``cpu`` has the functions of ``launches`` in PyTorch, and
``small_batch`` computes a batch at once whose logits fit into a CPU's cache.
"""

from .contrastive import contrastive_loss
from .distributed import distributed_contrastive_loss
from .nce import info_nce_loss, nt_xent_loss
from .sigmoid import sigmoid_loss

__all__ = ["contrastive_loss", "distributed_contrastive_loss", "info_nce_loss", "nt_xent_loss", "sigmoid_loss"]
