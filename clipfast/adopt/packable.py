"""Decides whether a text tower of OpenCLIP or transformers can compute packed texts, without the tokens it ignores."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..models.texts import wrapped_by_fsdp
from .parts import drops
from .places import class_name, is_untouched

KIND = "pack_text"
PACKS = "no token behind the end of a text, where these are a tenth of a batch"
# The class of peft's LoRA of a linear layer, and the classes of the modules inside such a LoRA.
_LORA = "peft.tuners.lora.layer.Linear"
_INSIDE = {f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ParameterDict")} | {
    f"torch.nn.modules.{name}" for name in ("linear.Linear", "linear.Identity", "dropout.Dropout")
}


def why_not_packed(stack: nn.Module, is_known: Callable[[nn.Module], bool]) -> str:
    """Return the reason why the blocks of an adopted text tower cannot compute packed texts, or "" if they can.

    Args:
        stack: the module that has the blocks.
        is_known: returns True for a module that computes each row independently, and for attention that is ours.
    """
    if _has_any_global_hook():
        return "there are hooks on all modules"
    for part in stack.modules():
        if not (is_known(part) or _is_row_wise(part)):
            return f"its blocks have parts that CLIP's have not, such as {type(part).__name__}"
        if not (is_untouched(part) or wrapped_by_fsdp(part)) or part._compiled_call_impl is not None:
            return "a part of its blocks has a hook, is compiled, or has been replaced by something else"
        if isinstance(part, nn.Dropout) and drops(part, part.p):
            return "it drops values"
    return ""


def _is_row_wise(part: Any) -> bool:
    """Return True for the modules of peft's LoRA of a linear layer, unless a variant of it looks at whole texts."""
    name = class_name(part)
    return name in _INSIDE or (name == _LORA and not getattr(part, "lora_variant", True))
