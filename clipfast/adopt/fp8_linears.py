"""Linear layers of adopted models in 8 bits: those of the transformer blocks of OpenCLIP, transformers and timm."""

from collections.abc import Iterator

from torch import Tensor, nn

from ..kernels.fp8.support import check_fp8
from ..models.fp8_layers import check_recipe
from ..models.layers import project
from .hf import part_of
from .open_clip import RESIDUAL
from .parts import MULTIHEAD, multihead_attention
from .places import Proposal, Replacement, class_name, runs_ours

KIND = "fp8"
_BLOCKS = (RESIDUAL, "open_clip.transformer.CustomResidualAttentionBlock", "timm.models.vision_transformer.Block")


def check_arguments(function: str, model: nn.Module, fp8: str | None, fp8_skip: tuple[int, int]) -> None:
    """Refuse a recipe or numbers of skipped blocks that are unknown for an adopted model, and GPUs without fp8.

    Raises:
        ValueError: one of them cannot be used.
    """
    if fp8 is None:
        return
    check_recipe(fp8, fp8_skip, (f"{function}: fp8", f"{function}: fp8_skip"))
    for device in {parameter.device for parameter in model.parameters()}:
        check_fp8(f"{function}: fp8", device)


def linear_forward(module: nn.Linear, input: Tensor, fp8: str) -> Tensor:
    """Compute an adopted model's ``nn.Linear`` in 8 bits: [..., K] -> [..., N]."""
    return project(input, module.weight, module.bias, fp8)


def propose(model: nn.Module, fp8: str, skip: tuple[int, int]) -> Iterator[tuple[str, nn.Module, Proposal]]:
    """Propose 8 bits for the linear layers of an adopted model's blocks; yield name, module and proposal.

    The caller makes all other replacements first, because ``nn.MultiheadAttention`` computes in 8 bits only if it is
    replaced.
    """
    for number, count, name, block in _blocks(model):
        if number < skip[0] or number >= count - skip[1]:
            yield name, block, Proposal(KIND, "16 bits by fp8_skip")
            continue
        # peft's adapters have a base_layer
        wrapped = [f"{inner}." for inner, part in block.named_modules() if hasattr(part, "base_layer")]
        for inner, layer in block.named_modules():
            if f"{inner}." in wrapped:
                yield f"{name}.{inner}", layer, Proposal(KIND, "16 bits, as an adapter wraps it")
            elif inner.startswith(tuple(wrapped)):
                continue
            elif type(layer) is nn.Linear:
                yield f"{name}.{inner}", layer, _proposal(fp8, linear_forward)
            elif class_name(layer) == MULTIHEAD:
                is_ours = runs_ours(layer) and layer.in_proj_weight is not None
                refused = Proposal(KIND, "its attention is not replaced")
                yield f"{name}.{inner}", layer, _proposal(fp8, multihead_attention) if is_ours else refused


def _proposal(fp8: str, function: object) -> Proposal:
    """Return the proposal to compute the linear layers of an adopted model's module by ``function`` in 8 bits."""
    return Proposal(KIND, f"clipfast.fp8_linear, recipe {fp8}", function, option="fp8", value=fp8)  # type: ignore[arg-type]


def keep_on_cpus(model: nn.Module, skip: tuple[int, int]) -> None:
    """Let an adopted model's blocks in 8 bits run our functions on CPUs too, where the originals would be faster."""
    for number, count, _, block in _blocks(model):
        if skip[0] <= number < count - skip[1]:
            for part in block.modules():
                for value in part.__dict__.values():
                    if isinstance(value, Replacement):
                        value.is_always_ours = True


def _blocks(model: nn.Module) -> Iterator[tuple[int, int, str, nn.Module]]:
    """Yield an adopted model's transformer blocks: number in the stack, blocks of the stack, name, and block."""
    for name, module in model.named_modules():
        found = [(child, block) for child, block in module.named_children() if _is_block(block)]
        for number, (child, block) in enumerate(found):
            yield number, len(found), f"{name}.{child}" if name else child, block


def _is_block(module: nn.Module) -> bool:
    """Return True if a module of an adopted model is a transformer block that is known."""
    return class_name(module) in _BLOCKS or part_of(module)[1] == "EncoderLayer"
