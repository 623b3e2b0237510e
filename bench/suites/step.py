"""A whole training step: forward, loss, backward and AdamW, on images that stay bytes until the model takes them.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, PaLM, appendix B) = model FLOPs of a step / (seconds of the step x
peak rate of the matrix units). A multiply-add is two operations; only products and convolutions are counted, by PyTorch
on meta tensors. Backward takes two products for each product of the forward pass, so a step is three forward passes and
the loss. Two numbers belong to a step of N pairs with D features, and they differ on purpose:

* :func:`step_flops`, for MFU, counts the published architecture, whatever an implementation leaves out or does twice.
  Every token counts in every layer, and all scores of a causal layer count. The published loss keeps its logits, so it
  needs one product of the features forward and two backward, each of 2 N^2 D: 6 N^2 D.
* :func:`step_floor_flops`, for "of floor", counts the products of our own step. Our loss keeps no N x N matrix and
  computes the logits once more in backward: 8 N^2 D, as the specification of ``contrastive_loss`` says. Our
  attention pool of a ResNet has one query, where the published one has as many as there are positions.

The time of a step includes the host that launches its kernels, but for the candidate that is replayed as a CUDA graph.
The inputs are on the device when the time begins. Our model packs texts there, unless it is compiled or captured; one
candidate does neither and still computes all padding, as published and as :mod:`..inspection.forecast` predicts it.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from clipfast import create_model, get_model_config
from clipfast.kernels import contrastive_loss, reference
from clipfast.kernels.contrastive.cases import LossShape
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import Floor, specs
from clipfast.models import SigLIPConfig
from clipfast.models.resnet import ModifiedResNet
from clipfast.train.graphs import graphed
from clipfast.train.optim import adamw
from clipfast.verify.models import draw_batch

from ..breakdown import Breakdown, trace
from ..case import OURS, Candidate, Case, Function, Inputs, Sizes
from ..categories import LOSS_RANGE
from . import peers

# A function that opens a range of the profiler, given its name.
Range = Callable[[str], AbstractContextManager[object]]
# Our candidates that compute the padding of texts: launch by launch, and as one CUDA graph.
PADDED, GRAPHED = f"{OURS} padded", f"{OURS} graphed"
FIELDS: Sizes = {"model": "ViT-B-32", "batch": 256}
SMALLEST: Sizes = {"model": "ViT-T-8-32", "batch": 2}
# The reference keeps the scores of every layer in float32, so a large batch would not fit.
GATE_BATCH = 16
# The loss depends on the differences between the features of a batch, and with random weights the features are nearly
# equal. In bf16, PyTorch's own gradients have an error of 3% if its features have an error of 1%.
SLACK = {"d_parameters": 3.0}
# Published models, each at a batch that fills a GPU; on a CPU one model at a small batch.
SHAPES: dict[str, list[Sizes]] = {
    "cpu": [{"model": "ViT-B-32", "batch": 8}],
    "cuda": [
        {"model": "ViT-B-32", "batch": 1024}, {"model": "ViT-B-16", "batch": 512}, {"model": "ViT-L-14", "batch": 128},
        {"model": "RN50", "batch": 256},
    ],
}  # fmt: skip


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Return the benchmark case of a training step of one model with one batch size.

    All candidates start from the same random weights. The first step of each is compared with the reference: the loss,
    the features and all gradients.
    """
    name, batch = shape["model"], shape["batch"]
    if isinstance(get_model_config(name), SigLIPConfig):
        raise ValueError(
            f"step: {name} is trained with the sigmoid loss, and the suite times the contrastive loss only"
        )
    draw = functools.partial(_inputs, name, device=device)
    ours = functools.partial(_ours, name, dtype, device)
    theirs = functools.partial(_open_clip, name, dtype, device)
    return Case(
        suite="step", op="step", shape=shape, dtype=dtype, device=device,
        inputs=functools.partial(draw, batch),
        gate_inputs=functools.partial(draw, min(batch, GATE_BATCH)),
        slack=SLACK,
        graph=False,
        candidates=(
            Candidate(OURS, functools.partial(ours, "auto")),
            Candidate(f"{OURS} compiled", lambda: _compiled(functools.partial(ours, "auto"), device, fullgraph=True)),
            Candidate(PADDED, functools.partial(ours, "auto", packs=False), note="padding of texts is computed"),
            Candidate(GRAPHED, lambda: ReplayedStep(ours("auto", capturable=True)), needs_gpu=True),
            Candidate("PyTorch", functools.partial(ours, "torch"), note="the same model on the reference ops"),
            Candidate("OpenCLIP", theirs),
            Candidate("OpenCLIP compiled", lambda: _compiled(theirs, device, fullgraph=False)),
        ),
        # The reference's model exists only while the true results are computed, to save memory.
        reference=Candidate("reference", functools.partial(_ours, name, "fp32", device, "torch")),
        floor=Floor(step_floor_flops(name, batch), 0),
        model_flops=step_flops(name, batch),
        items=(batch, "pairs"),
    )  # fmt: skip


@functools.cache
def _weights(name: str) -> dict[str, Tensor]:
    """Return the random weights that all candidates of a training step start from."""
    torch.manual_seed(0)
    return create_model(name).state_dict()


def _inputs(name: str, batch: int, device: torch.device) -> Inputs:
    """Draw images and texts for a benchmarked training step."""
    images, texts = draw_batch(get_model_config(name), batch)
    return {"images": images.to(device), "texts": texts.to(device)}


def _ours(
    name: str, dtype: str, device: torch.device, backend: str, *, packs: bool = True, capturable: bool = False
) -> "MeasuredStep":
    """Return our training step as a benchmark candidate, which may pack texts, and which a graph can hold."""
    model = create_model(name, device=device, backend=backend)
    model.load_state_dict(_weights(name))
    model.pack_text &= packs
    loss = functools.partial(contrastive_loss, backend=backend)
    return MeasuredStep(name, model, loss, dtype, capturable=capturable)


def _open_clip(name: str, dtype: str, device: torch.device) -> "MeasuredStep":
    """Return OpenCLIP's training step as a benchmark candidate."""
    open_clip = peers.need("open_clip", "open_clip_torch")
    # The model is made from our configuration, because OpenCLIP does not know the small model by name.
    model = open_clip.CLIP(**get_model_config(name).to_dict()).to(device)
    model.load_state_dict(_weights(name))
    step = MeasuredStep(name, _Normalizing(model), open_clip.ClipLoss(), dtype)
    step.optimizer = torch.optim.AdamW(step.optimizer.param_groups, fused=True)  # with the options of the groups
    return step


def _compiled(make: Callable[[], "MeasuredStep"], device: torch.device, *, fullgraph: bool) -> "MeasuredStep":
    """Compile model and loss of a benchmarked step, each as one graph if ``fullgraph``; the optimizer is fused."""
    peers.need_compiler(device)
    step = make()
    step.model, step.loss = (peers.compiled(function, fullgraph=fullgraph) for function in (step.model, step.loss))
    return step


class _Normalizing(nn.Module):
    """OpenCLIP's model after a normalisation on the device: the model takes floats, but bytes are faster to send."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        """Normalise the pixels for OpenCLIP's model in the benchmarked step, and run the model."""
        pixels = reference.normalize_uint8(images, reference.CLIP_MEAN, reference.CLIP_STD, torch.float32)
        return self.model(pixels, texts)


class MeasuredStep:
    """One step of AdamW on a batch, as a function of images and texts.

    The model computes both features and the logit scale, and the loss takes these three. ``dtype`` is the name of the
    autocast dtype or "fp32".
    """

    def __init__(self, name: str, model: nn.Module, loss: Function, dtype: str, *, capturable: bool = False) -> None:
        self.name = name
        self.model: Callable[..., Any] = model.train()
        # OpenCLIP's parameters have the same names as ours, after the prefix "model." of the module that normalises.
        self.parameters = {name.removeprefix("model."): p for name, p in model.named_parameters()}
        self.loss, self.dtype = loss, dtype
        self.optimizer: torch.optim.AdamW = adamw(model, 1e-4, (0.9, 0.98), 1e-6, 0.2, capturable=capturable)

    def __call__(self, images: Tensor, texts: Tensor, loss_range: Range = nullcontext) -> Tensor:
        """Take a training step, and return the loss before it."""
        *_, loss = self._forward(images, texts, loss_range)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def breakdown(self, images: Tensor, texts: Tensor, seconds: float) -> Breakdown:
        """Trace steps, which take ``seconds`` without a profiler, and return their time by category."""
        step = functools.partial(self, images, texts, loss_range=record_function)
        result = trace(step, images.device, seconds)
        if isinstance(get_model_config(self.name).vision.layers, int):
            return result.with_convolutions_as_input()
        return result

    def observe(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return a benchmarked step's loss, features and gradients of all parameters, without taking the step."""
        image, text, loss = self._forward(images, texts)
        loss.backward()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        flat = torch.cat([grads[name].flatten().float() for name in sorted(grads)])
        self.optimizer.zero_grad(set_to_none=True)
        return {"value": loss.detach(), "image": image.detach(), "text": text.detach(), "d_parameters": flat}

    def _forward(self, images: Tensor, texts: Tensor, loss_range: Range = nullcontext) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss and the features of a benchmarked step."""
        with torch.autocast(images.device.type, DTYPES[self.dtype], enabled=self.dtype != "fp32"):
            image, text, scale = self.model(images, texts)[:3]
            with loss_range(LOSS_RANGE):
                loss = self.loss(image, text, scale)
        return image, text, loss


class ReplayedStep:
    """A :class:`MeasuredStep` that is captured as a CUDA graph in its second call, and then replayed."""

    def __init__(self, step: MeasuredStep) -> None:
        self.step = step
        self.forget()

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Take a training step, as a CUDA graph from the second call on, and return the loss before it."""
        return self._replayed(images, texts)

    def forget(self) -> None:
        """Free the graph of the benchmarked step; the call after the next one captures another."""
        self._replayed = graphed(self.step.__call__, warmup=1)

    def observe(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return loss, features and gradients as :meth:`MeasuredStep.observe` does, written by a replayed graph."""
        observe = graphed(self.step.observe, warmup=1)
        observe(images, texts)
        return observe(images, texts)


def step_flops(name: str, pairs: int) -> float:
    """Return the model FLOPs of a benchmarked training step of the published model ``name`` on ``pairs`` pairs."""
    flops, embed_dim = forward_flops(name)
    return 3.0 * pairs * flops + 6.0 * pairs**2 * embed_dim


def step_floor_flops(name: str, pairs: int) -> float:
    """Return the least FLOPs of our own training step, to which the benchmark compares its time.

    The count includes all rows of the last block, although a step does not need all of them. So a step may seem to come
    closer to this floor than is possible.
    """
    flops, embed_dim = forward_flops(name, published=False)
    loss = specs()["contrastive_loss"]
    shape = LossShape(pairs, embed_dim)
    return 3.0 * pairs * flops + loss.floor(shape, 0, False).flops + loss.floor(shape, 0, True).flops


@functools.cache
def forward_flops(name: str, *, published: bool = True) -> tuple[float, int]:
    """Return the FLOPs of a pair in both towers of the benchmarked model ``name``, and the width of its features.

    ``published`` counts the attention pool of a ResNet as published: the queries, keys and values of all positions.
    """
    model = create_model(name, device="meta", backend="torch")
    size, embed_dim, pool = model.visual.image_size, model.config.embed_dim, 0.0
    if published and isinstance(model.visual, ModifiedResNet):
        tokens, width = model.visual.attnpool.positional_embedding.shape
        pool = tokens * (6.0 * width**2 + 4.0 * tokens * width + 2.0 * width * embed_dim)
        model.visual.add_module("attnpool", nn.Identity())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.empty(1, 3, size, size, device="meta"))
        model.encode_text(torch.empty(1, model.context_length, dtype=torch.long, device="meta"))
    return pool + counter.get_total_flops(), embed_dim
