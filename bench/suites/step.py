"""A whole training step, forward, loss, backward and AdamW, on images that are bytes until the model takes them.

AdamW here counts its steps on the host, so a step is no CUDA graph: the host that starts its kernels is in the time.
Inputs are on the device when the time begins; what their way there costs, as bytes or as floats, is told apart.
"""

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from clipfast import create_model, get_model_config, list_models
from clipfast.kernels import contrastive_loss, reference
from clipfast.kernels.floors import Floor
from clipfast.training.optim import adamw

from ..breakdown import Breakdown, copy_seconds, trace
from ..case import DTYPES, OURS, Candidate, Case, Function, Inputs
from ..categories import LOSS_RANGE
from ..flops import step_flops
from ..machine import synchronize
from . import peers

FIELDS: Mapping[str, int | str | bool] = {"model": "ViT-B-32", "batch": 256}
SMALLEST: Mapping[str, int | str | bool] = {"model": "ViT-T-8-32", "batch": 2}
END_OF_TEXT = 49407
# The reference keeps the scores of every layer in float32.
GATE_BATCH = 16
# The loss depends on how features of a batch differ, and at the start they are nearly the same: in bf16, PyTorch's own
# gradients are 3% off where its features are 1% off.
SLACK = {"d_parameters": 3.0}


def shapes(device_type: str) -> list[Mapping[str, int | str | bool]]:
    """Published models at a batch that fills a GPU, or a small one on a CPU."""
    if device_type == "cpu":
        return [{"model": "ViT-B-32", "batch": 8}]
    sizes = (("ViT-B-32", 1024), ("ViT-B-16", 512), ("ViT-L-14", 128), ("RN50", 256))
    return [{"model": model, "batch": batch} for model, batch in sizes]


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Every candidate starts from the same random weights, and is held to the reference's loss, features and gradients
    in its first step.
    """
    name, batch = shape["model"], shape["batch"]
    if name not in list_models():
        raise ValueError(f"step: unknown model {name!r}; known: {', '.join(list_models())}")
    draw = functools.partial(_inputs, name, device=device)
    ours = functools.partial(_ours, name, dtype, device)
    theirs = functools.partial(_open_clip, name, dtype, device)
    return Case(
        suite="step",
        op="step",
        shape=shape,
        dtype=dtype,
        device=device,
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
        reference=_Exact(name, device),
        floor=Floor(_step_flops(name, batch), 0),
        model_flops=step_flops(get_model_config(name), batch),
        transfers={pixels: _sent_bytes(name, batch, pixels) for pixels in ("uint8", "float32")},
        items=(batch, "pairs"),
    )


@functools.cache
def _weights(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create_model(name).state_dict()


def _inputs(name: str, batch: int, device: torch.device) -> Inputs:
    """Random images, and texts that end anywhere: features are read at the end, and would be alike if all ended at
    once.
    """
    config = get_model_config(name)
    size, length = config.vision.image_size, config.text.context_length
    texts = torch.randint(1, 40000, (batch, length), device=device)
    end = torch.randint(1, length, (batch, 1), device=device)
    texts.masked_fill_(torch.arange(length, device=device) > end, 0)
    return {
        "images": torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device),
        "texts": texts.scatter_(1, end, END_OF_TEXT),
    }


class _Exact:
    """What a step computes, by the reference ops in float32; the model lives as long as the call."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.observe(images, texts)["value"]

    def observe(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return _ours(self.name, "fp32", self.device, "torch").observe(images, texts)


def _ours(name: str, dtype: str, device: torch.device, backend: str) -> "TrainingStep":
    model = create_model(name, device=device, backend=backend)
    model.load_state_dict(_weights(name))
    return TrainingStep(name, model, functools.partial(contrastive_loss, backend=backend), dtype)


def _open_clip(name: str, dtype: str, device: torch.device) -> "TrainingStep":
    open_clip = peers.need("open_clip", "open_clip_torch")
    # from our configuration: OpenCLIP does not know the small model's name
    model = open_clip.CLIP(**get_model_config(name).to_dict()).to(device)
    model.load_state_dict(_weights(name))
    return TrainingStep(name, _Normalizing(model), open_clip.ClipLoss(), dtype, pixels="float32")


def _compiled(make: Callable[[], "TrainingStep"], device: torch.device, *, fullgraph: bool) -> "TrainingStep":
    """Model and loss compiled, each as one graph if ``fullgraph``; the optimizer is fused already."""
    peers.need_compiler(device)
    step = make()
    step.model, step.loss = (peers.compiled(function, fullgraph=fullgraph) for function in (step.model, step.loss))
    return step


class _Normalizing(nn.Module):
    """OpenCLIP's model takes floats: normalised on the device here, which spares it the larger transfer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        pixels = reference.normalize_uint8(images, reference.CLIP_MEAN, reference.CLIP_STD, torch.float32)
        return self.model(pixels, texts)


class TrainingStep:
    """One step of AdamW on a batch; :meth:`phases` times its parts, :meth:`observe` says what it computes, and
    :meth:`breakdown` where the time goes.

    Args:
        name: of the model's configuration.
        model: from images and texts to both features and the scale.
        loss: of these three.
        dtype: name of the autocast dtype, or "fp32".
        pixels: dtype of the pixels that its users send to the device.
    """

    def __init__(self, name: str, model: nn.Module, loss: Function, dtype: str, pixels: str = "uint8") -> None:
        self.name, self.pixels = name, pixels
        self._range: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext()
        self.model: Callable[..., Any] = model.train()
        # by the names of our model, which OpenCLIP's has too
        self.parameters = {name.removeprefix("model."): p for name, p in model.named_parameters()}
        self.loss, self.dtype = loss, dtype
        self.optimizer = adamw(model, 1e-4, (0.9, 0.98), 1e-6, 0.2)

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Take a step; returns the loss before it."""
        return self._run(images, texts, lambda _: None)

    def phases(self, images: Tensor, texts: Tensor) -> dict[str, float]:
        """Seconds of each part of a step, waiting for the device after each."""
        times: dict[str, float] = {}
        synchronize(images.device)
        last = time.perf_counter()

        def mark(phase: str) -> None:
            nonlocal last
            synchronize(images.device)
            now = time.perf_counter()
            times[phase], last = now - last, now

        self._run(images, texts, mark)
        return times

    def breakdown(self, images: Tensor, texts: Tensor, seconds: float) -> Breakdown:
        """Where the time goes in a step that takes ``seconds``, its inputs' way to the device included."""
        plain, self._range = self._range, record_function
        try:
            result = trace(functools.partial(self, images, texts), images.device, seconds)
        finally:
            self._range = plain
        if isinstance(get_model_config(self.name).vision.layers, int):
            result = result.with_convolutions_as_input()
        sent = copy_seconds(_sent_bytes(self.name, len(images), self.pixels), images.device)
        return result if sent is None else result.with_data(sent)

    def observe(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Loss, features and the gradient of all parameters, without taking the step."""
        image, text, loss = self._forward(images, texts, lambda _: None)
        loss.backward()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        flat = torch.cat([grads[name].flatten().float() for name in sorted(grads)])
        self.optimizer.zero_grad(set_to_none=True)
        return {"value": loss.detach(), "image": image.detach(), "text": text.detach(), "d_parameters": flat}

    def _forward(self, images: Tensor, texts: Tensor, mark: Callable[[str], None]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(images.device.type, DTYPES[self.dtype], enabled=self.dtype != "fp32"):
            image, text, scale = self.model(images, texts)[:3]
            mark("both encoders")
            with self._range(LOSS_RANGE):
                loss = self.loss(image, text, scale)
            mark("loss")
        return image, text, loss

    def _run(self, images: Tensor, texts: Tensor, mark: Callable[[str], None]) -> Tensor:
        *_, loss = self._forward(images, texts, mark)
        loss.backward()
        mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        return loss.detach()


def _sent_bytes(name: str, batch: int, pixels: str) -> int:
    """Bytes of a batch of images, in the dtype ``pixels``, and of its texts."""
    config = get_model_config(name)
    image = 3 * config.vision.image_size**2 * getattr(torch, pixels).itemsize
    return int(batch * (image + config.text.context_length * torch.long.itemsize))


@functools.cache
def _step_flops(name: str, batch: int) -> float:
    """Operations of our step's products and convolutions, the loss's included: three times the forward's.

    Those of the rows of a last block that are not read are counted with them, so a step may come nearer to this than it
    seems to be able to.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = create_model(name, device="meta", backend="torch")
    size = model.visual.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        image = model.encode_image(torch.empty(1, 3, size, size, device="meta"))
        model.encode_text(torch.empty(1, model.context_length, dtype=torch.long, device="meta"))
    return 3.0 * batch * counter.get_total_flops() + 8.0 * batch * batch * image.shape[-1]
