"""A whole training step: forward, loss, backward and AdamW, on images that stay bytes until the model takes them.

AdamW counts its steps on the host here, so a step cannot be a CUDA graph, and its time includes the host that launches
the kernels. The inputs are on the device when the time begins. What it costs to send them there, as bytes or as floats,
is reported separately.
"""

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from clipfast import create_model, get_model_config
from clipfast.kernels import contrastive_loss, reference
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import Floor
from clipfast.models import SigLIPConfig
from clipfast.training.optim import adamw
from clipfast.verify.models import draw_batch

from ..breakdown import Breakdown, copy_seconds, trace
from ..case import OURS, Candidate, Case, Function, Inputs, Sizes
from ..categories import LOSS_RANGE
from ..flops import step_floor_flops, step_flops
from ..machine import synchronize
from . import peers

Mark = Callable[[str], None]
# Opens a range of the profiler, by its name.
Range = Callable[[str], AbstractContextManager[object]]
FIELDS: Sizes = {"model": "ViT-B-32", "batch": 256}
SMALLEST: Sizes = {"model": "ViT-T-8-32", "batch": 2}
# The reference keeps the scores of every layer in float32, so a large batch would not fit.
GATE_BATCH = 16
# The loss depends on the differences between the features of a batch, and random weights make them nearly equal: in
# bf16, PyTorch's own gradients are off by 3% where its features are off by 1%.
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
    """Return the case of one model and batch.

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
            Candidate("PyTorch", functools.partial(ours, "torch"), note="the same model on the reference ops"),
            Candidate("OpenCLIP", theirs),
            Candidate("OpenCLIP compiled", lambda: _compiled(theirs, device, fullgraph=False)),
        ),
        # its model exists only while the truth is computed, to save memory
        reference=Candidate("reference", functools.partial(_ours, name, "fp32", device, "torch")),
        floor=Floor(step_floor_flops(name, batch), 0),
        model_flops=step_flops(name, batch),
        transfers={pixels: _sent_bytes(name, batch, pixels) for pixels in ("uint8", "float32")},
        items=(batch, "pairs"),
    )  # fmt: skip


@functools.cache
def _weights(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create_model(name).state_dict()


def _inputs(name: str, batch: int, device: torch.device) -> Inputs:
    images, texts = draw_batch(get_model_config(name), batch)
    return {"images": images.to(device), "texts": texts.to(device)}


def _ours(name: str, dtype: str, device: torch.device, backend: str) -> "MeasuredStep":
    model = create_model(name, device=device, backend=backend)
    model.load_state_dict(_weights(name))
    return MeasuredStep(name, model, functools.partial(contrastive_loss, backend=backend), dtype)


def _open_clip(name: str, dtype: str, device: torch.device) -> "MeasuredStep":
    open_clip = peers.need("open_clip", "open_clip_torch")
    # made from our configuration, because OpenCLIP does not know the small model by name
    model = open_clip.CLIP(**get_model_config(name).to_dict()).to(device)
    model.load_state_dict(_weights(name))
    return MeasuredStep(name, _Normalizing(model), open_clip.ClipLoss(), dtype, pixels="float32")


def _compiled(make: Callable[[], "MeasuredStep"], device: torch.device, *, fullgraph: bool) -> "MeasuredStep":
    """Compile model and loss, each as one graph if ``fullgraph``. The optimizer is fused already."""
    peers.need_compiler(device)
    step = make()
    step.model, step.loss = (peers.compiled(function, fullgraph=fullgraph) for function in (step.model, step.loss))
    return step


class _Normalizing(nn.Module):
    """OpenCLIP's model behind a normalisation on the device: it takes floats, and sending bytes is cheaper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        pixels = reference.normalize_uint8(images, reference.CLIP_MEAN, reference.CLIP_STD, torch.float32)
        return self.model(pixels, texts)


class MeasuredStep:
    """One step of AdamW on a batch, as a function of images and texts.

    The model computes both features and the logit scale, and the loss takes these three. ``dtype`` is the name of the
    autocast dtype or "fp32", ``pixels`` that of the pixels that users of this implementation send to the device.
    """

    def __init__(self, name: str, model: nn.Module, loss: Function, dtype: str, pixels: str = "uint8") -> None:
        self.name, self.pixels = name, pixels
        self.model: Callable[..., Any] = model.train()
        # OpenCLIP's model has the same names, behind the prefix of the module that normalises
        self.parameters = {name.removeprefix("model."): p for name, p in model.named_parameters()}
        self.loss, self.dtype = loss, dtype
        self.optimizer = adamw(model, 1e-4, (0.9, 0.98), 1e-6, 0.2)

    def __call__(
        self, images: Tensor, texts: Tensor, mark: Mark = lambda _: None, loss_range: Range = nullcontext
    ) -> Tensor:
        """Take a step and return the loss before it. ``mark`` is told of each part that ends."""
        *_, loss = self._forward(images, texts, mark, loss_range)
        loss.backward()
        mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        return loss.detach()

    def phases(self, images: Tensor, texts: Tensor) -> dict[str, float]:
        """Take a step and return the seconds of each part. The host waits for the device after each."""
        times: dict[str, float] = {}
        synchronize(images.device)
        last = time.perf_counter()

        def mark(phase: str) -> None:
            nonlocal last
            synchronize(images.device)
            now = time.perf_counter()
            times[phase], last = now - last, now

        self(images, texts, mark)
        return times

    def breakdown(self, images: Tensor, texts: Tensor, seconds: float) -> Breakdown:
        """Trace steps, which take ``seconds`` without a profiler, and return where the time goes.

        The transfer of the inputs to the device counts too: bytes [B, 3, H, W] and token ids [B, context_length].
        """
        step = functools.partial(self, images, texts, loss_range=record_function)
        result = trace(step, images.device, seconds)
        if isinstance(get_model_config(self.name).vision.layers, int):
            result = result.with_convolutions_as_input()
        sent = copy_seconds(_sent_bytes(self.name, len(images), self.pixels), images.device)
        return result if sent is None else result.with_data(sent)

    def observe(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return loss, features and the gradient of all parameters, without taking the step."""
        image, text, loss = self._forward(images, texts)
        loss.backward()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        flat = torch.cat([grads[name].flatten().float() for name in sorted(grads)])
        self.optimizer.zero_grad(set_to_none=True)
        return {"value": loss.detach(), "image": image.detach(), "text": text.detach(), "d_parameters": flat}

    def _forward(
        self, images: Tensor, texts: Tensor, mark: Mark = lambda _: None, loss_range: Range = nullcontext
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(images.device.type, DTYPES[self.dtype], enabled=self.dtype != "fp32"):
            image, text, scale = self.model(images, texts)[:3]
            mark("both encoders")
            with loss_range(LOSS_RANGE):
                loss = self.loss(image, text, scale)
            mark("loss")
        return image, text, loss


def _sent_bytes(name: str, batch: int, pixels: str) -> int:
    """Return the bytes of a batch: images with pixels of the dtype ``pixels``, and texts."""
    config = get_model_config(name)
    image = 3 * config.vision.image_size**2 * getattr(torch, pixels).itemsize
    return int(batch * (image + config.text.context_length * torch.long.itemsize))
