"""The categories that the time of a training step is divided into, by the names of kernels and of the ops around them.

:func:`classify` only looks at names. It takes the category of the first of these that has one:

1. an op around the kernel that owns everything inside it: the loss, the optimizer, attention, or an op of ours;
2. the kernel's name, if a compiler has fused the kernel; the most expensive op in that name decides;
3. the innermost op around the kernel that has a category of its own;
4. the name of any other kernel.

The matrix products of an attention that is written out in PyTorch count as GEMM. A name that no rule knows is OTHER,
and is never guessed at.
"""

import functools
import re
from collections.abc import Sequence

from clipfast.kernels.spec import specs

GEMM, ATTENTION, NORM, CONVOLUTION, INPUT = "GEMM", "attention", "norm, activation", "convolution", "patch, text input"
LOSS, OPTIMIZER, COPIES, OTHER = "loss", "optimizer", "copies, elementwise", "other"
DATA, HOST = "data", "host"
# All categories, in the order in which tables and plots show them.
CATEGORIES = (GEMM, ATTENTION, NORM, CONVOLUTION, INPUT, LOSS, OPTIMIZER, COPIES, OTHER, DATA, HOST)
# The profiler range that a step opens around its loss. Without it, the loss's products would look like the model's.
LOSS_RANGE = "step: loss"

# Pairs of a category and a pattern; the first pattern that matches a name decides.
Rules = tuple[tuple[str, re.Pattern[str]], ...]


def _rules(*rules: tuple[str, str]) -> Rules:
    """Compile pairs of a category and a pattern into the rules that classify kernels in a trace."""
    return tuple((category, re.compile(pattern)) for category, pattern in rules)


# Ops that own every kernel inside them, such as the loss or the optimizer; the outermost op that matches decides.
OWNERS = _rules(
    (LOSS, rf"^{LOSS_RANGE}$"),
    (OPTIMIZER, r"^Optimizer\.step"),
    (ATTENTION, r"scaled_dot_product|ScaledDotProduct|_(flash|efficient|cudnn)_attention"),
    *((spec.category, rf"clipfast(::|_){spec.torch_op or spec.name}") for spec in specs().values()),
)
_ATEN = {
    GEMM: r"(addmm|mm|bmm|baddbmm|addmv|mv|dot|_addmm_activation|_scaled_mm)_?",
    CONVOLUTION: r"_?(conv[123]d|\w*convolution\w*|\w*conv2d\w*)",
    NORM: r"\w*(layer_norm|batch_norm|group_norm)\w*|(gelu|relu|silu|sigmoid|threshold|hardtanh)(_backward)?_?",
    INPUT: r"embedding\w*",
    LOSS: r"_?log_softmax\w*|nll_loss\w*|cross_entropy\w*",
    ATTENTION: r"_?softmax\w*|_masked_softmax\w*|_safe_softmax",
    OPTIMIZER: r"_fused_adam\w*|_foreach_\w+",
    # Ops that only describe memory, allocate it or call other ops do no work on data, so they count as the host's.
    HOST: r"empty\w*|new_empty\w*|new_zeros|new_full|zeros|zeros_like|ones|ones_like|full|full_like|scalar_tensor|"
    r"_?reshape\w*|_?unsafe_view|view\w*|as_strided_?|t|numpy_T|transpose|permute|expand\w*|select|slice|narrow|split\w*|"
    r"chunk|unbind|unsqueeze|squeeze|flatten|unflatten|alias|detach_?|resize_|resolve_conj|resolve_neg|lift_fresh|"
    r"promote_types|item|_local_scalar_dense|is_nonzero|set_|diagonal|movedim|moveaxis|result_type|to|matmul|linear|"
    r"einsum|contiguous|mkldnn_linear|type_as|__and__|record_stream|unfold|native_dropout|dropout|is_pinned|"
    r"_pin_memory|pin_memory|_has_compatible_shallow_copy_type",
    COPIES: r"_to_copy|copy_|clone|cat|stack|fill_|zero_|add_?|sub_?|mul_?|div_?|neg_?|reciprocal|exp2?_?|log2?_?|"
    r"sqrt_?|rsqrt_?|pow_?|abs_?|clamp\w*|where|masked_fill_?|index\w*|_index_put_impl_|gather\w*|scatter\w*|"
    r"select_backward|slice_backward|sum|mean|any|all|max|min|amax|amin|argmax|arange|eq|ne|lt|le|gt|ge|bitwise_\w+|"
    r"logical_\w+|linalg_\w+|norm|avg_pool2d\w*|mean_backward|addcmul_?|addcdiv_?|lerp_?|_adaptive_avg_pool2d\w*|"
    r"ceil_?|floor_?|round_?|frexp|logaddexp|maximum|minimum|triu_?|tril_?|repeat\w*|tanh\w*|sort\w*|argsort|cumsum|diff|rsub",
}  # fmt: skip
# Patterns for the names of single ops. If ops are nested, the innermost op that has a category decides.
OPS = _rules(
    *((category, rf"^(aten|mkldnn|mkl)::({names})$") for category, names in _ATEN.items()),
    (GEMM, r"^(mkldnn::_linear_pointwise|mkl::_mkl_linear)"),
    (CONVOLUTION, r"^mkldnn::_convolution"),
)
# The names that PyTorch itself (autograd, compiler, profiler, CUDA calls) records around ops. They count as the host's.
FRAMEWORK = re.compile(
    r"^(autograd::|torch::autograd::|Optimizer\.|CompiledFunction|Torch-Compiled|TorchDynamo|AOTDispatcher|Pregraph|"
    r"## Call|ProfilerStep|step: |detach$|cuda[A-Z]|cu[A-Z]\w*$|hip[A-Z])|Backward\d*$"
)
# INDUCTOR matches the names of kernels that TorchInductor has fused. Such a name lists the ops in the kernel, and FUSED
# finds them, the most expensive first.
INDUCTOR = re.compile(r"(?:^|_)(?:triton|cpp)_(?:[a-z]{3}_)?fused_")
FUSED = _rules(
    (GEMM, r"(?<=tem_fused).*_(mm|addmm|bmm)"),
    (LOSS, r"log_softmax|nll_loss|cross_entropy"),
    (NORM, r"layer_norm|batch_norm|group_norm|gelu|relu|sigmoid|silu|threshold|bias_act"),
    (ATTENTION, r"scaled_dot_product|softmax|attention"),
    (INPUT, r"embedding|patch_embed"),
    (OPTIMIZER, r"adam"),
    (COPIES, r"."),
)
# Kernels by name: ours first, then those of libraries, with special patterns before general ones.
KERNELS = _rules(
    *((spec.category, rf"^({'|'.join(spec.kernels)})$") for spec in specs().values()),
    (DATA, r"(?i)memcpy *(HtoD|host *to *device)"),
    (COPIES, r"(?i)^(memcpy|memset)"),
    (LOSS, r"(?i)nll_?loss|log_?softmax|cross_?entropy"),
    (ATTENTION, r"(?i)flash|fmha|sdpa|mem_eff|attention|softmax"),
    (OPTIMIZER, r"(?i)multi_tensor_apply|fused_?adam"),
    (NORM, r"(?i)layer_?norm|batch_?norm|bn_(fw|bw)|GammaBeta|cuComputeGradInput|gelu|relu|threshold|sigmoid|silu"),
    (CONVOLUTION, r"(?i)conv|implicit_gemm|fprop|dgrad|wgrad|winograd|nchwToNhwc|nhwcToNchw"),
    (INPUT, r"(?i)embedding"),
    (GEMM, r"(?i)gemm|nvjet|xmma|cutlass|cublas|splitK|gemv|^Cijk_"),
    (COPIES, r"(?i)elementwise|copy|CatArray|reduce_kernel|index|scatter|gather|fill|transpose|sort|scan|pool"),
)  # fmt: skip


@functools.cache
def _first(rules: Rules, name: str) -> str | None:
    """Return the category of the first rule that matches a kernel's ``name`` in a trace, or None."""
    return next((category for category, pattern in rules if pattern.search(name)), None)


@functools.cache
def _of_op(name: str) -> str | None:
    """Return the category of a single op in a trace, or None if no rule knows its name."""
    if INDUCTOR.search(name):
        return _first(FUSED, name)
    return _first(OPS, name) or (HOST if FRAMEWORK.search(name) else None)


def classify(kernel: str, ops: Sequence[str] = ()) -> str:
    """Return the category of a kernel in a trace; ``ops`` are the names around its launch, the outermost first."""
    by_owner = next((category for op in ops if (category := _first(OWNERS, op))), None)
    if by_owner is not None:
        return by_owner
    inductor = _first(FUSED, kernel) if INDUCTOR.search(kernel) else None
    # A kernel is never work of the host, so an op of category HOST says nothing about a kernel inside it.
    by_op = next((category for op in reversed(ops) if (category := _of_op(op)) not in (None, HOST)), None)
    return inductor or by_op or _first(KERNELS, kernel) or OTHER


def classify_op(ops: Sequence[str]) -> str:
    """Return the category of the CPU time that the last of ``ops`` spends itself; the earlier ops are around it."""
    by_owner = next((category for op in ops if (category := _first(OWNERS, op))), None)
    return by_owner or _of_op(ops[-1]) or OTHER
