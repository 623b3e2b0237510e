"""``python -m clipfast.bench.adoption.steps``: training steps of small OpenCLIP models on a CPU, with us and without.

The original and a patched copy take turns in one process of one thread, so that other work on the machine slows both
down alike: forward, OpenCLIP's loss or ours, backward and AdamW. ``--everything`` runs our ops where the original is
faster too, which is how that was found out (``CPU_DTYPES`` in adopt/places.py).
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import clipfast
from clipfast.adopt import places

from .trainer import lower_quartile

# Each case says how it differs from a ViT in float32: in its towers, its precision, or its way of training.
CASES: dict[str, dict[str, Any]] = {
    "ViT": {},
    "ViT amp_bf16": {"precision": "amp"},
    "ViT pure_bf16": {"precision": "bf16"},
    "ViT compiled": {"compiled": True},
    "ViT checkpointed": {"checkpointed": True},
    "ViT accumulated": {"accumulate": 2},
    "ViT image locked": {"locked": True},
    "ViT patch dropout": {"vision": {"patch_dropout": 0.5}},
    "RN50": {"vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}},
    "RN50 pure_bf16": {"vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, "precision": "bf16"},
    "CoCa": {"coca": True},
    "CoCa amp_bf16": {"coca": True, "precision": "amp"},
    "SigLIP": {"siglip": True},
    "SigLIP amp_bf16": {"siglip": True, "precision": "amp"},
}
CONTEXT, VOCABULARY = 76, 1000


def build(case: dict[str, Any], width: int, layers: int) -> nn.Module:
    """Return a model of OpenCLIP in training mode."""
    import open_clip

    torch.manual_seed(0)
    heads = max(1, width // 64)
    vision = {
        "image_size": 224, "patch_size": 32, "layers": layers, "width": width, "head_width": width // heads,
        **case.get("vision", {}),
    }  # fmt: skip
    text: dict[str, Any] = {
        "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": width, "heads": heads, "layers": layers,
    }  # fmt: skip
    if case.get("coca"):
        vision |= {"attentional_pool": True, "attn_pooler_heads": heads, "output_tokens": True}
        cls_text = {**text, "embed_cls": True, "output_tokens": True}
        model: Any = open_clip.CoCa(width, {**text, "mlp_ratio": 4}, cls_text, vision)
    elif case.get("siglip"):
        model = open_clip.CustomTextCLIP(width, vision, text, init_logit_bias=-10.0)
    else:
        model = open_clip.CLIP(width, vision, text)
    if case.get("locked"):
        model.lock_image_tower()
    if case.get("checkpointed"):
        model.set_grad_checkpointing()
    return model.to(torch.bfloat16 if case.get("precision") == "bf16" else torch.float32).train()


def stepper(model: Any, case: dict[str, Any], batch: int, *, ours: bool) -> Callable[[], object]:
    """Return a function that makes a training step."""
    import open_clip

    losses: Any = clipfast if ours else open_clip.loss
    name = "CoCaLoss" if case.get("coca") else "SigLipLoss" if case.get("siglip") else "ClipLoss"
    options = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} if case.get("coca") else {}
    loss = getattr(losses, name)(**options)
    model.output_dict = True
    size = case.get("vision", {}).get("image_size", 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator, dtype=next(model.parameters()).dtype)
    texts = torch.randint(1, VOCABULARY, (batch, CONTEXT), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    forward = torch.compile(model) if case.get("compiled") else model

    def step() -> None:
        for _ in range(case.get("accumulate", 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=case.get("precision") == "amp"):
                outputs = forward(images, texts)
                if case.get("coca") and "labels" not in outputs:  # in main, the trainer makes them
                    outputs |= {"logits": outputs["logits"][:, :-1], "labels": texts[:, 1:]}
                found = loss(**outputs, output_dict=True)
                total: Tensor = torch.stack([value.float() for value in found.values()]).sum()
            total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Return the lower quartiles of the CPU seconds of both, and the median of the quotients of neighbours."""
    functions = theirs, ours
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(-2, rounds):
        for each in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            functions[each]()
            if number >= 0:
                seconds[each].append(time.process_time() - start)
    return lower_quartile(seconds[0]), lower_quartile(seconds[1]), statistics.median(map(lambda a, b: a / b, *seconds))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each case, and return 0."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.bench.adoption.steps", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 192], help="of both towers (default: 64 192)")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--everything", action="store_true", help="run our ops where the original is faster too")
    args = parser.parse_args(argv)
    if args.everything:
        places.CPU_DTYPES = (*places.CPU_DTYPES, torch.float32, torch.bfloat16)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        "| case | width | CPU s of a step | with clipfast | times faster | median of quotients |",
        "|---" * 6 + "|",
        sep="\n",
    )
    for name, width in itertools.product(args.cases, args.widths):
        case = CASES[name]
        model = build(case, width, args.layers)
        patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
        step, step_of_ours = (stepper(each, case, args.batch, ours=each is patched) for each in (model, patched))
        theirs, ours, quotient = measure(step, step_of_ours, args.rounds)
        print(f"| {name} | {width} | {theirs:.4f} | {ours:.4f} | {theirs / ours:.3f} | {quotient:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
