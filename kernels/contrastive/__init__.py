"""The contrastive losses: logits are computed in blocks, and the whole matrix of logits is never in memory.

``contrastive``, ``sigmoid``, ``nce`` and ``nt_xent`` hold the losses: equations, public functions, registration.
``distributed`` has the loss of a batch that is spread over processes, and ``exchange`` the messages of these processes.
All losses use ``shared`` (checks of arguments, gradients) and ``stats`` (pairs, vectors of maxima and sums).

``launches`` computes statistics and gradients in blocks, whose sizes ``block_sizes`` chooses. Its kernels are in
``softmax_kernels`` (contrastive, InfoNCE, NT-Xent) and ``kernels`` (sigmoid, and what all losses share); ``tiles`` has
the Triton functions of both, and ``operands`` the form in which they take features. The products of a block of G (the
gradient with respect to the logits) with the features have three forms: ``products`` (the usual one), ``one_block`` (G
is a single block) and ``strips`` (few rows and many columns). ``merges`` joins the statistics of InfoNCE and NT-Xent,
whose rows have logits in two blocks.
``cpu`` has the functions of ``launches`` in PyTorch, and ``small_batch`` computes a batch at once whose logits fit into
a CPU's cache.

For a batch that is spread over processes, ``modes`` chooses which features and gradients the processes exchange, by an
estimate of the time. ``spec`` and ``cases`` list the calls that are checked, compiled and measured.
"""

from .contrastive import contrastive_loss
from .distributed import distributed_contrastive_loss
from .nce import info_nce_loss
from .nt_xent import nt_xent_loss
from .sigmoid import sigmoid_loss

__all__ = ["contrastive_loss", "distributed_contrastive_loss", "info_nce_loss", "nt_xent_loss", "sigmoid_loss"]
