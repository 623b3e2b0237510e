"""Calls on the second of two GPUs while the first is current, for a process that takes the stub driver for both.

``test_launcher.py`` runs it under a CUDA build of PyTorch, whose device guards and threads of autograd are then the
real ones. It prints the number of calls, and what a launch without a guard raises.
"""

import functools
import json
from unittest import mock

import torch

from clipfast import create_model
from clipfast.kernels import contrastive_loss
from clipfast.kernels.spec import Draw, specs
from clipfast.training.optim import adamw
from clipfast.training.step import GraphedStep, TrainingStep
from clipfast.verify.rule import value_and_grads

SECOND = torch.device("cuda", 1)


class NoGuard(torch.cuda.device):
    """A guard that leaves the current device as it is."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def call(spec, shape, dtype):
    """Call an op forward and backward on the second GPU."""
    made = spec.call(shape, "", Draw(), dtype)
    inputs = {name: x.to(SECOND) for name, x in made.inputs.items()}
    grads = tuple(grad.to(SECOND) for grad in made.grads)
    found = value_and_grads(functools.partial(spec.op, **made.options), inputs, grads)
    assert all(value.device == SECOND for value in found.values())
    assert torch.cuda.current_device() == 0


def graphed_step():
    """Capture a training step on the second GPU, and replay it."""
    model = create_model("ViT-T-8-32", device=SECOND)
    # the memory of the stub reads as zero, which is no learning rate
    optimizer = adamw(model, 1e-3, (0.9, 0.98), 1e-6, 0.2, capturable=True)
    with mock.patch.object(optimizer, "step"):
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        take = GraphedStep(TrainingStep(model, optimizer, contrastive_loss, autocast, 1.0, 64), model.context_length)
        images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device=SECOND)
        texts = torch.zeros(64, 9, dtype=torch.int64, device=SECOND)
        for _ in range(6):
            assert take(images, texts).device == SECOND
    assert torch.cuda.current_device() == 0


def main():
    """Make every call, the graphed step, and a call without the guard."""
    calls = 0
    for spec in specs().values():
        for shape in spec.small:
            for dtype in (torch.float32, torch.bfloat16):
                call(spec, shape, dtype)
                calls += 1
    graphed_step()
    raised = ""
    try:
        with mock.patch.object(torch.cuda, "device", NoGuard):
            call(specs()["bias_gelu"], specs()["bias_gelu"].small[0], torch.float32)
    except RuntimeError as error:
        raised = str(error)
    print(json.dumps({"calls": calls, "without a guard": raised}))


if __name__ == "__main__":
    main()
