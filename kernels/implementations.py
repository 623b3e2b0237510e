"""The ops of a transformer block, without checks of input, for an ``autograd.Function`` that runs several of them.

That function has checked its input. It runs only where no compiler, transform or profiler needs to see single ops
(``backends.is_watched``), and below autograd, as ``backends.Op`` runs one op. It keeps a function for each op that
computes the op at one layout (``backends.Op.planned_by``), in the dict that :func:`plans_of` returns.
"""

from typing import Any

from .activation.op import _bias_act_bwd, _bias_act_fwd
from .attention.op import MAX_HEAD_DIM, _attention_bwd, _attention_fwd, takes_sdpa
from .attention_pool.op import _pool_bwd, _pool_fwd
from .backends import Op
from .configs import planned
from .fp8.linear import _fp8_linear_bwd, _fp8_linear_fwd
from .fp8.norm import _layer_norm_fp8_bwd, _layer_norm_fp8_fwd
from .fp8.op import _bias_act_fp8_bwd, _bias_act_fp8_fwd, _quantize_both, _quantize_rows
from .layer_norm.op import MAX_WIDTH, _layer_norm_bwd, _layer_norm_fwd

Plans = dict[Any, Any]


@planned
def plans_of(*_: Any) -> Plans:
    """Return a dict for functions that compute the ops of a transformer block: the same dict for equal arguments."""
    return {}


def compute(plans: Plans, op: Op, name: Any, *args: Any) -> Any:
    """Compute an op below autograd by the function that ``plans`` keeps under ``op`` and ``name``.

    All calls with the same ``plans``, ``op`` and ``name`` must have the same layout. A result that the registered op
    returns as an empty tensor, such as the gradient of a bias that needs none, may be None.
    """
    found = plans.get((name, op))
    if found is None:
        planner: Any = op.planner
        found = plans[name, op] = planner(*args)
    return found(*args)


layer_norm_fwd, layer_norm_bwd = _layer_norm_fwd, _layer_norm_bwd
attention_fwd, attention_bwd = _attention_fwd, _attention_bwd
attention_pool_fwd, attention_pool_bwd = _pool_fwd, _pool_bwd
bias_act_fwd, bias_act_bwd = _bias_act_fwd, _bias_act_bwd
layer_norm_fp8_fwd, layer_norm_fp8_bwd = _layer_norm_fp8_fwd, _layer_norm_fp8_bwd
bias_act_fp8_fwd, bias_act_fp8_bwd = _bias_act_fp8_fwd, _bias_act_fp8_bwd
quantize_rows, quantize_both = _quantize_rows, _quantize_both
fp8_linear_fwd, fp8_linear_bwd = _fp8_linear_fwd, _fp8_linear_bwd

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_WIDTH",
    "Plans",
    "attention_bwd",
    "attention_fwd",
    "attention_pool_bwd",
    "attention_pool_fwd",
    "bias_act_bwd",
    "bias_act_fp8_bwd",
    "bias_act_fp8_fwd",
    "bias_act_fwd",
    "compute",
    "fp8_linear_bwd",
    "fp8_linear_fwd",
    "layer_norm_bwd",
    "layer_norm_fp8_bwd",
    "layer_norm_fp8_fwd",
    "layer_norm_fwd",
    "plans_of",
    "quantize_both",
    "quantize_rows",
    "takes_sdpa",
]
