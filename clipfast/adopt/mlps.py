"""The multilayer perceptrons of all libraries: the activation adds the bias of the layer before it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import bias_gelu, bias_quick_gelu
from .hf_parts import hf_part
from .places import Proposal, class_name, computes, is_plain

KIND = "activations"
_OPS = {
    "torch.nn.modules.activation.GELU": bias_gelu,
    "timm.layers.activations.GELU": bias_gelu,
    "timm.layers.activations.QuickGELU": bias_quick_gelu,
    "open_clip.transformer.QuickGELU": bias_quick_gelu,
    "open_clip.layers.QuickGELU": bias_quick_gelu,
    "transformers.activations.GELUActivation": bias_gelu,
    "transformers.activations.QuickGELUActivation": bias_quick_gelu,
}
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")
_LAYERS = (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"])


def propose_mlp(module: nn.Module) -> Proposal | None:
    """Say what to do with ``module``; None if it is no multilayer perceptron that we know."""
    if type(module) is nn.Sequential and list(module._modules) in _LAYERS:
        return _propose(module.c_fc, module.gelu, open_clip_mlp)
    name = class_name(module)
    if name == "timm.layers.mlp.Mlp":
        return _propose(module.fc1, module.act, timm_mlp)
    if hf_part(module)[1] == "MLP":
        return _propose(module.fc1, module.activation_fn, hf_mlp)
    if name.startswith("timm.layers.mlp."):
        return Proposal(KIND, f"{type(module).__name__} is not one of the perceptrons that are known")
    return None


def propose_activation(module: nn.Module, inside: set[int]) -> Proposal | None:
    """Say why ``module`` is left alone if it is an activation that is not in one of the perceptrons ``inside``."""
    name, library = type(module).__name__, class_name(module).rpartition(".")[0]
    is_activation = (library in _ACTIVATIONS and name != "MultiheadAttention") or class_name(module) in _OPS
    if not is_activation or id(module) in inside:
        return None
    return Proposal(KIND, f"{name} is not in one of the perceptrons that are known")


def find_inside(model: nn.Module) -> set[int]:
    """Return the identities of the layers in perceptrons that :func:`propose_mlp` speaks of."""
    return {id(layer) for module in model.modules() if propose_mlp(module) is not None for layer in module.children()}


def _is_by_tanh(act: nn.Module) -> bool:
    return getattr(act, "approximate", "none") != "none"


def _op_of(act: nn.Module) -> Any:
    """Return the op that computes ``act`` of a sum with a bias, or None if there is none."""
    return None if _is_by_tanh(act) else _OPS.get(class_name(act))


def _propose(linear: Any, act: Any, function: Any) -> Proposal:
    op = _op_of(act)
    if op is None:
        name = f"{type(act).__name__} by tanh" if _is_by_tanh(act) else type(act).__name__
        return Proposal(KIND, f"{name} is neither GELU by the error function nor QuickGELU")
    if not isinstance(linear, nn.Linear) or linear.bias is None:
        return Proposal(KIND, "the layer before the activation is not linear, or has no bias")
    name = "bias_gelu" if op is bias_gelu else "bias_quick_gelu"
    return Proposal(KIND, f"clipfast.{name}", function)


def open_clip_mlp(module: Any, x: Tensor) -> Tensor:
    """Compute the ``mlp`` of an OpenCLIP block: [..., E] -> [..., E]."""
    x = _linear_activation(module.c_fc, module.gelu, x)
    for layer in list(module)[2:]:
        x = layer(x)
    return x


def timm_mlp(module: Any, x: Tensor) -> Tensor:
    """Compute ``timm.layers.Mlp``: [..., C] -> [..., out_features]."""
    x = module.drop1(_linear_activation(module.fc1, module.act, x))
    return module.drop2(module.fc2(module.norm(x)))


def hf_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    """Compute the ``MLP`` of a block of transformers' CLIP or SigLIP: [..., E] -> [..., E]."""
    return module.fc2(_linear_activation(module.fc1, module.activation_fn, hidden_states))


def _linear_activation(linear: Any, act: nn.Module, x: Tensor) -> Tensor:
    """Return ``act(linear(x))``."""
    if not computes(x) or not is_plain(linear, nn.Linear) or linear.bias is None:
        return act(linear(x))
    op = _op_of(act)
    if op is None or not is_plain(act, type(act)):
        return act(linear(x))
    return op(F.linear(x, linear.weight), linear.bias)
