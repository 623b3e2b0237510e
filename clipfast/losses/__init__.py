"""The losses as modules, under OpenCLIP's names, and gradients of large batches in small parts."""

from .accumulation import accumulate_gradients, largest_micro_batch
from .clip_loss import ClipLoss
from .coca_loss import CoCaLoss
from .distill_loss import DistillClipLoss
from .siglip_loss import SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "accumulate_gradients", "largest_micro_batch"]
