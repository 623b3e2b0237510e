"""The contrastive losses: logits are computed in blocks, and never exist all at once.

``contrastive``, ``sigmoid`` and ``nce`` hold the losses: equations, public functions, registration. ``distributed`` is
the loss of a batch spread over processes, and ``exchange`` has the messages of these processes. They share ``shared``
(checks of arguments, gradients) and ``stats`` (pairs, vectors of maxima and sums).

``launches`` launches the kernels in ``softmax_kernels`` and ``kernels``, in blocks that ``block_sizes`` chooses;
``tiles`` is what the kernels share. ``cpu`` does the same in PyTorch.
"""

from .contrastive import contrastive_loss
from .distributed import distributed_contrastive_loss
from .nce import info_nce_loss, nt_xent_loss
from .sigmoid import sigmoid_loss

__all__ = ["contrastive_loss", "distributed_contrastive_loss", "info_nce_loss", "nt_xent_loss", "sigmoid_loss"]
