"""The ops at the cases of ``shapes``: inputs, the rule on value and gradients, and bitwise repeats."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels import reference
from . import cases, shapes
from .block_inputs import BLOCK_MAKERS, Made, normal
from .block_shapes import RowShape
from .cases import Case
from .context import exact_float32, poisoned
from .loss_shapes import AnyLoss, LossShape, QueueShape, SigmoidShape, ViewShape
from .report import FAIL, PASS, SKIP, CheckResult, results_of
from .rule import Draw, Judgement, in_double, judge_fairly, value_and_grads
from .shapes import AttentionShape, PatchShape, TextShape

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Elements of the reference's largest tensor up to which the truth is computed in float64 (eight such tensors exist at
# once); above, in float32, which can only judge the half-precision dtypes.
FLOAT64_ELEMENTS = {"cpu": 2**26, "cuda": 2**29}
# A case that fails over a few draws is judged over as many of these as the elements allow.
MANY_DRAWS, MANY_ELEMENTS = 32, 2**25
INTERPRETER_DRAWS = 3
REPEATS = {cases.CPU: 5, cases.CUDA: 100}
QUICK_REPEATS = {cases.CPU: 3, cases.CUDA: 20}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of an op: the op, its reference, the inputs by name and the gradient of the output."""

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    grad: Tensor


def problem(case: Case, dtype: torch.dtype, device: str, draw: int = 0) -> Problem:
    """Inputs of ``case``: the same on every machine, device and leg, drawn from a seed made of its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name} {draw}".encode()))
    name, options, inputs, grad = _MAKERS[type(case.shape)](case, generator)
    cast = {
        key: (x.to(dtype) if x.is_floating_point() and not _stays_float32(case, key, x) else x).to(device)
        for key, x in inputs.items()
    }
    laid_out = {key: x if x.ndim == 0 else _lay_out(x, case.layout) for key, x in cast.items()}
    grad = grad.to(device, dtype if grad.ndim else torch.float32)
    if grad.ndim == 0 and case.layout == cases.EXPANDED:
        first = next(iter(cast))
        laid_out[first] = cast[first][:1].expand_as(cast[first])
    elif grad.ndim:
        grad = grad.flatten()[0].expand_as(grad) if case.layout == cases.EXPANDED else _lay_out(grad, case.layout)
    op, expected = (
        functools.partial(_side_by_side, getattr(module, name), **options) for module in (kernels, reference)
    )
    return Problem(op, expected, laid_out, grad)


def _stays_float32(case: Case, name: str, x: Tensor) -> bool:
    """Scale and bias of the logits are parameters of their own, as under autocast, and so are those of what walks
    rows.
    """
    return x.ndim == 0 or (isinstance(case.shape, RowShape) and name not in ("x", "residual"))


def _side_by_side(op: Callable[..., Tensor | tuple[Tensor, ...]], **inputs: Any) -> Tensor:
    """The result of ``op``, or its results in one tensor."""
    results = op(**inputs)
    return torch.cat(results, -1) if isinstance(results, tuple) else results


def _make_loss(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, AnyLoss):
        raise TypeError(f"expected the shape of a loss, got {shape!r}")
    image, text = _features(shape, case.values, generator)
    scale, grad = torch.tensor(shape.scale), torch.tensor(1.0)
    if isinstance(shape, ViewShape):
        # of a row of zeros that is normalised, the gradient is 10^12 times the others'
        options = {"normalize": case.values != "zero rows"}
        return "nt_xent_loss", options, {"first": image, "second": text, "logit_scale": scale}, grad
    if isinstance(shape, LossShape):
        return "contrastive_loss", {}, {"image": image, "text": text, "logit_scale": scale}, grad
    if isinstance(shape, SigmoidShape):
        parameters = {"logit_scale": scale, "logit_bias": torch.tensor(shape.bias)}
        return "sigmoid_loss", {}, {"image": image, "text": text, **parameters}, grad
    negatives = F.normalize(normal(generator, shape.queue, shape.dim), dim=-1)
    if case.values == "all-equal rows":
        negatives = image[:1].repeat(shape.queue, 1)
    inputs = {"query": image, "key": text, "negatives": negatives, "logit_scale": scale}
    return "info_nce_loss", {"in_batch": shape.in_batch}, inputs, grad


def _features(shape: AnyLoss, values: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both sides of the pairs, [pairs, dim]."""
    n, d = shape.pairs, shape.dim
    image = F.normalize(normal(generator, n, d), dim=-1)
    noise = F.normalize(normal(generator, n, d), dim=-1)
    text = (
        image.clone()
        if shape.matched == 1
        else F.normalize(shape.matched * image + (1 - shape.matched) * noise, dim=-1)
    )
    if values == "duplicate rows":
        image, text = (x[torch.arange(n) // 2] for x in (image, text))
    elif values == "all-equal rows":
        image = text = image[:1].repeat(n, 1)
    elif values == "zero rows":
        image[:3], text[-3:] = 0, 0
    elif values == "large":
        image = 100 * image
    elif values == "one-hot":
        image = text = torch.eye(n, d)
    return image, text


def _make_attention(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, AttentionShape):
        raise TypeError(f"expected an AttentionShape, got {shape!r}")
    width = shape.heads * shape.head_dim
    qkv = normal(generator, shape.batch, shape.tokens, 3 * width)
    grad = normal(generator, shape.batch, shape.tokens, width)
    if case.values == "one-hot":
        qkv[..., : 2 * width] *= 8
    elif case.values == "uniform":
        qkv[..., : 2 * width] *= 1e-4
    elif case.values == "duplicate rows":
        qkv = qkv[:, torch.arange(shape.tokens) // 2]
    elif case.values == "all-equal rows":
        qkv = qkv[:, :1].repeat(1, shape.tokens, 1)
    elif case.values == "large negative":
        qkv[..., :width], qkv[..., width : 2 * width] = 10, -10 + qkv[..., width : 2 * width] / 10
    elif case.values == "large":
        qkv *= 30
    inputs = {"qkv": qkv, "bias": normal(generator, 3 * width)}
    return "attention", {"num_heads": shape.heads, "causal": shape.causal}, inputs, grad


def _make_patch(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, PatchShape):
        raise TypeError(f"expected a PatchShape, got {shape!r}")
    size = (shape.batch, 3, shape.height, shape.width)
    num_patches = (shape.height // shape.patch) * (shape.width // shape.patch)
    images = (
        torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) if shape.uint8 else normal(generator, *size)
    )
    weight = normal(generator, shape.embed_dim, 3, shape.patch, shape.patch) / shape.patch
    if case.values.startswith("all "):
        images.fill_(int(case.values.split()[1]))
    elif case.values == "large":
        images *= 100
    elif case.values == "one-hot":
        weight = torch.eye(shape.embed_dim, weight[0].numel()).view_as(weight)
    elif case.values == "duplicate rows":
        images = images[:1].repeat(shape.batch, 1, 1, 1)
    elif case.values == "tiny weight":
        weight *= 1e-3
    scale = 0.0 if case.values == "tiny weight" else 1.0
    inputs = {
        "images": images,
        "weight": weight,
        "class_embedding": scale * normal(generator, shape.embed_dim),
        "positional_embedding": scale * normal(generator, 1 + num_patches, shape.embed_dim),
    }
    kept = num_patches
    if shape.keep is not None:
        kept = shape.keep
        inputs["keep"] = torch.rand(shape.batch, num_patches, generator=generator).argsort(1)[:, :kept]
    return "patch_embed", {}, inputs, normal(generator, shape.batch, 1 + kept, shape.embed_dim)


def _make_text(case: Case, generator: torch.Generator) -> Made:
    shape = case.shape
    if not isinstance(shape, TextShape):
        raise TypeError(f"expected a TextShape, got {shape!r}")
    batch, length, vocab, width = shape
    text = torch.randint(0, vocab, (batch, length), generator=generator)
    if case.values == "one id":
        text.fill_(vocab - 1)
    elif case.values == "padded":
        text[:, 10:] = 0
    elif case.values == "all different":
        text = torch.randperm(vocab, generator=generator)[: text.numel()].view_as(text)
    inputs = {
        "text": text,
        "token_embedding": normal(generator, vocab, width),
        "positional_embedding": normal(generator, length, width),
    }
    return "text_embed", {}, inputs, normal(generator, batch, length, width)


_MAKERS: dict[type, Callable[[Case, torch.Generator], Made]] = {
    **dict.fromkeys((LossShape, SigmoidShape, QueueShape, ViewShape), _make_loss),
    AttentionShape: _make_attention,
    PatchShape: _make_patch,
    TextShape: _make_text,
    **BLOCK_MAKERS,
}


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x
    if layout == "hwc":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.ndim == 4 else x
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x


def verify_case(op: str, leg: str, case: Case, dtype: str, *, quick: bool) -> list[CheckResult]:
    """All rows of one case: an exception of the op is a row that fails."""
    template = CheckResult(op, leg, case.check, case.name, dtype, why=case.why)
    device = "cuda" if leg == cases.CUDA else "cpu"
    if case.check == cases.DETERMINISM:
        repeats = (QUICK_REPEATS if quick else REPEATS)[leg]
        return _repeat(template, problem(case, TORCH_DTYPES[dtype], device), repeats)
    return _hold_to_rule(template, case, TORCH_DTYPES[dtype], device)


def _hold_to_rule(template: CheckResult, case: Case, dtype: torch.dtype, device: str) -> list[CheckResult]:
    wide = case.shape.elements > FLOAT64_ELEMENTS[device]
    if wide and dtype == torch.float32:
        reason = f"{case.shape.elements:.1e} logits: a float64 truth does not fit; a float32 one cannot judge float32"
        return [dataclasses.replace(template, verdict=SKIP, reason=reason)]

    def draw(number: int) -> Draw:
        call = problem(case, dtype, device, number)
        with poisoned():
            ours = value_and_grads(call.op, call.inputs, call.grad)
        with exact_float32():
            truth = _truth(call, in_float32=wide)
            same_dtype = value_and_grads(call.reference, call.inputs, call.grad)
            if case.cancels:
                fused = value_and_grads(_fused_attention(call), call.inputs, call.grad)
                same_dtype = {name: _less_exact(same_dtype[name], fused[name], truth[name]) for name in truth}
            return ours, same_dtype, truth

    few = min(case.draws, INTERPRETER_DRAWS) if template.leg == cases.INTERPRETER else case.draws
    many = max(few, min(MANY_DRAWS, MANY_ELEMENTS // max(case.shape.elements, 1)))
    judgements, draws = judge_fairly(draw, few, many)
    if case.check == cases.EXTREME:
        judgements = {name: _finite(name, judgement, draws) for name, judgement in judgements.items()}
    return results_of(dataclasses.replace(template, truth="float32" if wide else "float64"), judgements)


def _fused_attention(call: Problem) -> Callable[..., Tensor]:
    num_heads, causal = call.reference.keywords["num_heads"], call.reference.keywords["causal"]  # type: ignore[attr-defined]

    def fused(qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = reference.with_bias_gradient(qkv, bias).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    return fused


def _less_exact(one: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    errors = [(result.double() - truth).abs().max() for result in (one, other)]
    return one if errors[0] >= errors[1] else other


def _truth(draw: Problem, *, in_float32: bool) -> dict[str, Tensor]:
    if in_float32:
        inputs = {name: x.float() if x.is_floating_point() else x for name, x in draw.inputs.items()}
        return value_and_grads(draw.reference, inputs, draw.grad.float())
    return value_and_grads(draw.reference, in_double(draw.inputs), draw.grad.double())


def _finite(name: str, judgement: Judgement, draws: Sequence[Draw]) -> Judgement:
    if judgement.fault or all(ours[name].isfinite().all() for ours, _, _ in draws):
        return judgement
    return dataclasses.replace(judgement, fault="not finite")


def _repeat(template: CheckResult, call: Problem, repeats: int) -> list[CheckResult]:
    """The same bits again and again; a row for each output."""
    first = value_and_grads(call.op, call.inputs, call.grad)
    changed: dict[str, str] = {}
    for repeat in range(1, repeats + 1):
        for name, value in value_and_grads(call.op, call.inputs, call.grad).items():
            different = _different_bytes(first[name], value)
            if different and name not in changed:
                changed[name] = f"repeat {repeat} of {repeats} differs in {different} of {value.nbytes} bytes"
    return [
        dataclasses.replace(
            template,
            output=name,
            verdict=FAIL if name in changed else PASS,
            reason=changed.get(name, f"{repeats} repeats, the same bits"),
        )
        for name in first
    ]


def _different_bytes(first: Tensor, second: Tensor) -> int:
    one, other = (x.reshape(-1).contiguous().view(torch.uint8) for x in (first, second))
    return int((one != other).sum())


def planned(op: str, leg: str, dtypes: Iterable[str], *, quick: bool) -> Iterator[tuple[Case, str]]:
    """Cases of ``op`` on ``leg``, each with a dtype."""
    for case in shapes.CASES[op]:
        if leg not in case.legs or (quick and not case.quick):
            continue
        for dtype in dtypes:
            if not (leg == cases.CPU and dtype in case.slow):
                yield case, dtype


def timed(rows: Callable[[], list[CheckResult]], template: CheckResult) -> list[CheckResult]:
    """``rows()`` with the seconds it took, shared out evenly; an exception as one row that fails."""
    started = time.perf_counter()
    try:
        result = rows()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        result = [dataclasses.replace(template, verdict=FAIL, reason=text)]
    share = (time.perf_counter() - started) / max(1, len(result))
    return [dataclasses.replace(row, seconds=share) for row in result]
