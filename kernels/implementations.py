"""The implementations of the ops of a transformer block, without checks and autograd.

They are for a larger ``autograd.Function``, which computes several ops and has checked its input. Such a function runs
where nothing watches (``backends.is_watched``) and below autograd, as ``backends.Op`` runs one op.
"""

from .activation import _bias_act_bwd, _bias_act_fwd
from .attention.op import MAX_HEAD_DIM, _attention_bwd, _attention_fwd, takes_sdpa
from .attention_pool.op import _pool_bwd, _pool_fwd
from .backends import by_layout
from .layer_norm.op import MAX_WIDTH, _layer_norm_bwd, _layer_norm_fwd

layer_norm_fwd, layer_norm_bwd = by_layout(_layer_norm_fwd), by_layout(_layer_norm_bwd)
attention_fwd, attention_bwd = by_layout(_attention_fwd), by_layout(_attention_bwd)
attention_pool_fwd, attention_pool_bwd = by_layout(_pool_fwd), by_layout(_pool_bwd)
bias_act_fwd, bias_act_bwd = by_layout(_bias_act_fwd), by_layout(_bias_act_bwd)

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_WIDTH",
    "attention_bwd",
    "attention_fwd",
    "attention_pool_bwd",
    "attention_pool_fwd",
    "bias_act_bwd",
    "bias_act_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "takes_sdpa",
]
