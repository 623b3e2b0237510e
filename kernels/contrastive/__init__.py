"""The contrastive losses: logits are computed in blocks, and never exist all at once.

``contrastive``, ``info_nce``, ``nt_xent`` and ``sigmoid`` each hold one loss: equations, public function, registration.
``distributed`` is the loss of a batch spread over processes, and ``exchange`` what these processes send each other.

``logit_blocks`` says what the losses need of an implementation, and chooses one by device: ``triton_blocks`` launches
the kernels in ``softmax_kernels``, ``sigmoid_kernels`` and ``feature_kernels`` (made of ``logit_tiles``), and
``cpu_blocks`` does the same in PyTorch. The losses share ``loss_arguments`` (checks), ``features`` (rows and pairs),
``softmax_stats`` (vectors of maxima and sums), ``gradients`` and ``registration``.
"""

from .contrastive import contrastive_loss
from .distributed import distributed_contrastive_loss
from .info_nce import info_nce_loss
from .nt_xent import nt_xent_loss
from .sigmoid import sigmoid_loss

__all__ = ["contrastive_loss", "distributed_contrastive_loss", "info_nce_loss", "nt_xent_loss", "sigmoid_loss"]
