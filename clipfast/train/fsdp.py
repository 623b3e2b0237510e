"""FSDP2: every process holds a part of the weights, their gradients and the optimizer's state.

Each block is a unit whose weights are gathered when it runs. The rest of the model is one more unit. PyTorch's
``fully_shard`` shards tensors along their first dimension, and so takes no scalars. The logit scale and the logit bias
are therefore replicated on every process, with the shape that OpenCLIP gives them, and :func:`exchange_scalars`
averages their gradients.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..distributed.world import World
from ..models import CLIP
from ..models.resnet import ModifiedResNet
from ..models.transformer import ResidualAttentionBlock
from .train_config import TrainConfig


def is_sharded(config: TrainConfig, world: World) -> bool:
    """Return True if FSDP2 is to shard trained weights. One process keeps full weights, whatever ``--fsdp`` says."""
    return config.fsdp and world.size > 1


def blocks_of(model: CLIP) -> list[nn.Module]:
    """Return the modules that become FSDP2 units: all transformer blocks, and the stages of a ResNet."""
    blocks: list[nn.Module] = [part for part in model.modules() if isinstance(part, ResidualAttentionBlock)]
    visual: nn.Module = model.visual
    if isinstance(visual, ModifiedResNet):
        blocks += [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    return blocks


def shard(config: TrainConfig, model: CLIP, mesh: DeviceMesh) -> None:
    """Shard the weights of ``model`` in place over the ranks of ``mesh``, after compiling its blocks (--torchcompile).

    The arithmetic stays that of DistributedDataParallel: autocast chooses the precision, and gradients are summed in
    float32.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.fsdp_offload_cpu else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": offload,
    }
    compiler: Any = {"backend": config.torchcompile_backend, "mode": config.torchcompile_mode}
    for block in blocks_of(model):
        if config.torchcompile:
            # Only ``forward`` is compiled, so FSDP2's hooks, which gather the weights, run outside of compiled code.
            block.forward = torch.compile(block.forward, fullgraph=True, **compiler)
        fully_shard(block, reshard_after_forward=not config.fsdp_no_reshard_after_forward, **options)
    # Weights outside of the blocks, such as projections, stay gathered: the backward pass begins with some of them.
    fully_shard(model, reshard_after_forward=False, ignored_params=set(_scalars(model)), **options)
    _gather_for_direct_calls(model)


def _gather_for_direct_calls(model: CLIP) -> None:
    """Let ``encode_image`` and ``encode_text`` gather FSDP2's weights if they are called directly, not by ``forward``.

    If an encoder gathered them within the forward pass too, PyTorch would free the weights at the end of the encoder,
    and gather them again for the backward pass.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    running = False
    forward = model.forward

    def whole_forward(*args: Any, **options: Any) -> Any:
        """Run the model's forward pass, in which the encoders do not gather the weights again."""
        nonlocal running
        running = True
        try:
            return forward(*args, **options)
        finally:
            running = False

    def chosen(plain: Callable[..., Tensor], gathering: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return an encoder that calls ``gathering``, or ``plain`` while the model's forward pass is running."""
        return lambda *args, **options: (plain if running else gathering)(*args, **options)

    for name in ("encode_image", "encode_text"):
        plain = getattr(model, name)
        register_fsdp_forward_method(model, name)
        setattr(model, name, chosen(plain, getattr(model, name)))
    model.forward = whole_forward  # type: ignore[method-assign]


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """Return the scalar parameters of a model (logit scale and bias), which FSDP2 does not shard."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 0]


def exchange_scalars(model: nn.Module, world: World) -> None:
    """Average the gradients of logit scale and logit bias over the ranks, which FSDP2 does for other weights only."""
    gradients = [parameter.grad for parameter in _scalars(model) if parameter.grad is not None]
    if gradients:
        means = world.mean(torch.stack([gradient.float() for gradient in gradients]))
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)


@contextlib.contextmanager
def unsharded(config: TrainConfig, model: nn.Module) -> Iterator[None]:
    """Gather all weights that FSDP2 has sharded on every rank while the context lasts; forward passes send nothing.

    Ranks may then compute different numbers of forward passes, or none. All ranks must enter and leave the context
    together.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.reshard()  # the next forward pass must gather weights anew, since an optimizer step may come before
            is_freed = not config.fsdp_no_reshard_after_forward and part is not model
            part.set_reshard_after_forward(is_freed, recurse=False)
