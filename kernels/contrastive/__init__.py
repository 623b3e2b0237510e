"""The contrastive losses: logits in blocks, their sums and their gradients, and the losses made of them.

``loss``, ``nce`` and ``sigmoid`` hold the ops. ``stats`` is what they know of rows and columns; the work on blocks of
logits has one interface (``blocks``) and two implementations, ``launches`` of the Triton kernels in ``tiles``, and
``cpu``. ``distributed`` is the loss of a batch spread over processes, and ``exchange`` what these tell each other.
"""

from .distributed import distributed_contrastive_loss
from .loss import contrastive_loss
from .nce import info_nce_loss, nt_xent_loss
from .sigmoid import sigmoid_loss

__all__ = ["contrastive_loss", "distributed_contrastive_loss", "info_nce_loss", "nt_xent_loss", "sigmoid_loss"]
