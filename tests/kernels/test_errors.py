"""Bad input to the ops: each gets an error that names the op, the argument, and what came."""

import pytest
import torch

from clipfast.kernels import (
    attention,
    attention_pool,
    attention_qkv,
    bias_gelu,
    contrastive_loss,
    info_nce_loss,
    layer_norm,
    layer_norm_pair,
    nt_xent_loss,
    patch_embed,
    retrieval_ranks,
    sigmoid_loss,
)

from ..conftest import INTERPRET, ON_GPU

X = torch.zeros(4, 8)
QKV = torch.zeros(2, 5, 48)
PATCH = {
    "images": torch.zeros(2, 3, 8, 8),
    "weight": torch.zeros(6, 3, 4, 4),
    "class_embedding": torch.zeros(6),
    "positional_embedding": torch.zeros(5, 6),
}
TEXT = {
    "text": torch.zeros(2, 5, dtype=torch.int64),
    "token_embedding": torch.zeros(9, 8),
    "positional_embedding": torch.zeros(5, 8),
}

LOSS_ERRORS = [
    ((X.tolist(), X, 1.0), TypeError, "image must be a torch.Tensor, got list"),
    ((X[0], X, 1.0), ValueError, r"image must have 2 dimensions, got shape \(8,\)"),
    ((X, X[:, :5], 1.0), ValueError, r"same shape, got \(4, 8\) and \(4, 5\)"),
    ((X, X[:3], 1.0), ValueError, r"same shape, got \(4, 8\) and \(3, 8\)"),
    ((X.int(), X.int(), 1.0), TypeError, "image must be one of float32, float16, bfloat16, float64, got int32"),
    ((X, X.half(), 1.0), TypeError, "text is float16, but image is float32"),
    ((X, X.to("meta"), 1.0), ValueError, "text is on meta, but image is on cpu"),
    ((X, X, torch.ones(2)), ValueError, r"logit_scale must have one element, got shape \(2,\)"),
    ((X, X, torch.ones((), device="meta")), ValueError, "logit_scale is on meta, but image is on cpu"),
    ((X, X, torch.tensor(1 + 2j)), TypeError, "logit_scale must have a floating dtype, got complex64"),
    ((X, X, "ten"), TypeError, "logit_scale must be a number or a torch.Tensor, got str"),
    (
        (X.to(torch.float8_e5m2), X.to(torch.float8_e5m2), 1.0),
        TypeError,
        "image must be one of float32, .*, got float8_e5m2",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), LOSS_ERRORS, ids=[case[2][:40] for case in LOSS_ERRORS])
def test_contrastive_loss(arguments, error, message):
    with pytest.raises(error, match=f"contrastive_loss: .*{message}"):
        contrastive_loss(*arguments)


QUEUE_ERRORS = [
    ((X.tolist(), X, 1.0), {}, TypeError, "query must be a torch.Tensor, got list"),
    ((X, X[0], 1.0), {}, ValueError, r"key must have 2 dimensions, got shape \(8,\)"),
    ((X, X[:3], 1.0), {}, ValueError, r"query and key must have the same shape, got \(4, 8\) and \(3, 8\)"),
    ((X, X.half(), 1.0), {}, TypeError, "key is float16, but query is float32"),
    ((X, X, torch.ones(2)), {}, ValueError, r"logit_scale must have one element, got shape \(2,\)"),
    ((X, X, torch.ones((), device="meta")), {}, ValueError, "logit_scale is on meta, but query is on cpu"),
    ((X, X, 1.0), {"in_batch": False}, ValueError, r"in_batch=False needs negatives \[K, D\], got None"),
    ((X, X, 1.0), {"in_batch": 1}, TypeError, "in_batch must be a bool, got int"),
    ((X, X, 1.0), {"negatives": X[:, :7]}, ValueError, r"negatives must be \[K, 8\], got \(4, 7\)"),
    ((X, X, 1.0), {"negatives": X.half()}, TypeError, "negatives is float16, but query is float32"),
    ((X, X, 1.0), {"negatives": X.to("meta")}, ValueError, "negatives is on meta, but query is on cpu"),
    ((X, X, 1.0), {"negatives": [0.0]}, TypeError, "negatives must be a torch.Tensor, got list"),
    ((X, X, 1.0), {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), QUEUE_ERRORS, ids=[case[3][:40] for case in QUEUE_ERRORS]
)
def test_info_nce_loss(arguments, options, error, message):
    with pytest.raises(error, match=f"info_nce_loss: .*{message}"):
        info_nce_loss(*arguments, **options)


VIEW_ERRORS = [
    ((X.tolist(), X, 1.0), TypeError, "first must be a torch.Tensor, got list"),
    ((X, X[:3], 1.0), ValueError, r"first and second must have the same shape, got \(4, 8\) and \(3, 8\)"),
    ((X, X.half(), 1.0), TypeError, "second is float16, but first is float32"),
    ((X, X, "ten"), TypeError, "logit_scale must be a number or a torch.Tensor, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), VIEW_ERRORS, ids=[case[2][:40] for case in VIEW_ERRORS])
def test_nt_xent_loss(arguments, error, message):
    with pytest.raises(error, match=f"nt_xent_loss: .*{message}"):
        nt_xent_loss(*arguments)


SIGMOID_ERRORS = [
    ((X.tolist(), X, 1.0, 0.0), TypeError, "image must be a torch.Tensor, got list"),
    ((X, X[:3], 1.0, 0.0), ValueError, r"same shape, got \(4, 8\) and \(3, 8\)"),
    ((X, X.half(), 1.0, 0.0), TypeError, "text is float16, but image is float32"),
    ((X, X, torch.ones(2), 0.0), ValueError, r"logit_scale must have one element, got shape \(2,\)"),
    ((X, X, 1.0, torch.ones(2)), ValueError, r"logit_bias must have one element, got shape \(2,\)"),
    ((X, X, 1.0, None), TypeError, "logit_bias must be a number or a torch.Tensor, got NoneType"),
    ((X, X, 1.0, torch.ones((), device="meta")), ValueError, "logit_bias is on meta, but image is on cpu"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), SIGMOID_ERRORS, ids=[case[2][:40] for case in SIGMOID_ERRORS]
)
def test_sigmoid_loss(arguments, error, message):
    with pytest.raises(error, match=f"sigmoid_loss: .*{message}"):
        sigmoid_loss(*arguments)


ATTENTION_ERRORS = [
    ((QKV[0], 2), {}, ValueError, r"qkv must have 3 dimensions, got shape \(5, 48\)"),
    ((QKV, 5), {}, ValueError, "3 \\* num_heads \\* head_dim, got 48 with num_heads=5"),
    ((QKV, 0), {}, ValueError, "num_heads=0"),
    ((QKV, 2.0), {}, TypeError, "num_heads must be an int, got float"),
    ((QKV, True), {}, TypeError, "num_heads must be an int, got bool"),
    ((QKV, 2), {"causal": "no"}, TypeError, "causal must be a bool, got str"),
    ((QKV.int(), 2), {}, TypeError, "qkv must be one of float32, .*, got int32"),
    ((torch.zeros(1, 2, 3 * 136), 1), {}, ValueError, "head_dim must be at most 128, got 136"),
    ((QKV, 2), {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), ATTENTION_ERRORS, ids=[case[3][:40] for case in ATTENTION_ERRORS]
)
def test_attention(arguments, options, error, message):
    with pytest.raises(error, match=f"attention: .*{message}"):
        attention(*arguments, **options)


W = torch.ones(8)
NORM_ERRORS = [
    ((X.tolist(), W, W), {}, TypeError, "x must be a torch.Tensor, got list"),
    ((torch.zeros(()), W, W), {}, ValueError, r"x must have one dimension or more, got shape \(\)"),
    ((X.int(), W, W), {}, TypeError, "x must be one of float32, .*, got int32"),
    ((X, W[:7], W), {}, ValueError, r"weight must be \[8\] on cpu, got \(7,\) on cpu"),
    ((X, W, W[None]), {}, ValueError, r"bias must have 1 dimensions, got shape \(1, 8\)"),
    ((X, W, W.to("meta")), {}, ValueError, r"bias must be \[8\] on cpu, got \(8,\) on meta"),
    ((X, W, W, "small"), {}, TypeError, "eps must be a number, got str"),
    ((X, W, W, -1.0), {}, ValueError, "eps must not be negative, got -1.0"),
    ((X, W, W), {"residual": X[:3]}, ValueError, r"residual must be \(4, 8\) on cpu, got \(3, 8\) on cpu"),
    ((X, W, W), {"residual": X.long()}, TypeError, "residual must be one of float32, .*, got int64"),
    ((X, W, W), {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
    ((X[:, :0], W[:0], W[:0]), {}, ValueError, "rows must be 1 to 8192 wide, got 0"),
    ((torch.zeros(2, 8193), torch.ones(8193), torch.ones(8193)), {}, ValueError, "wide, got 8193: use backend='torch'"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), NORM_ERRORS, ids=[case[3][:40] for case in NORM_ERRORS]
)
def test_layer_norm(arguments, options, error, message):
    with pytest.raises(error, match=f"layer_norm: .*{message}"):
        layer_norm(*arguments, **options)


PAIR_ERRORS = [
    ((X.tolist(), W, W, W, W), {}, TypeError, "x must be a torch.Tensor, got list"),
    ((X.int(), W, W, W, W), {}, TypeError, "x must be one of float32, .*, got int32"),
    ((X, W[:7], W, W, W), {}, ValueError, r"weight_1 must be \[8\] on cpu, got \(7,\) on cpu"),
    ((X, W, W[None], W, W), {}, ValueError, r"bias_1 must have 1 dimensions, got shape \(1, 8\)"),
    ((X, W, W, 1.0, W), {}, TypeError, "weight_2 must be a torch.Tensor, got float"),
    ((X, W, W, W, W.to("meta")), {}, ValueError, r"bias_2 must be \[8\] on cpu, got \(8,\) on meta"),
    ((X, W, W, W, W, "small"), {}, TypeError, "eps_1 must be a number, got str"),
    ((X, W, W, W, W), {"eps_2": -1.0}, ValueError, "eps_2 must not be negative, got -1.0"),
    ((X, W, W, W, W), {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
    ((X[:, :0], *[W[:0]] * 4), {}, ValueError, "rows must be 1 to 8192 wide, got 0"),
    ((torch.zeros(2, 8193), *[torch.ones(8193)] * 4), {}, ValueError, "wide, got 8193: use backend='torch'"),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), PAIR_ERRORS, ids=[case[3][:40] for case in PAIR_ERRORS]
)
def test_layer_norm_pair(arguments, options, error, message):
    with pytest.raises(error, match=f"layer_norm_pair: .*{message}"):
        layer_norm_pair(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.tolist(), W), TypeError, "x must be a torch.Tensor, got list"),
        ((X, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
        ((X, W[:7]), ValueError, r"bias must be \[8\] on cpu, got \(7,\) on cpu"),
        ((X.bool(), W), TypeError, "x must be one of float32, .*, got bool"),
    ],
)
def test_bias_gelu(arguments, error, message):
    with pytest.raises(error, match=f"bias_gelu: .*{message}"):
        bias_gelu(*arguments)


KEEP = torch.tensor([[2, 0], [3, 1]])
PATCH_ERRORS = [
    ({"images": torch.zeros(2, 3, 8)}, ValueError, r"images must have 4 dimensions, got shape \(2, 3, 8\)"),
    (
        {"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)},
        TypeError,
        "images must be one of float32, .*, uint8, got int64",
    ),
    ({"images": torch.zeros(2, 3, 0, 8)}, ValueError, "image size 0x8 is not a multiple of the patch size 4"),
    ({"images": torch.zeros(2, 3, 9, 8)}, ValueError, "image size 9x8 is not a multiple of the patch size 4"),
    (
        {"images": torch.zeros(2, 1, 8, 8), "mean": (0.5,), "std": (0.5,)},
        ValueError,
        r"weight must be \[E, 1, P, P\].*got \(6, 3, 4, 4\)",
    ),
    ({"weight": torch.zeros(6, 3, 4, 2)}, ValueError, r"weight must be \[E, 3, P, P\].*got \(6, 3, 4, 2\)"),
    ({"class_embedding": torch.zeros(7)}, ValueError, r"class_embedding must be \[6\], got \(7,\)"),
    (
        {"positional_embedding": torch.zeros(4, 6)},
        ValueError,
        r"positional_embedding must be \[5, 6\] for 8x8 images.*got \(4, 6\)",
    ),
    ({"mean": (0.5,)}, ValueError, r"mean must be 3 finite numbers, one per channel, got \(0.5,\)"),
    ({"mean": 0.5}, TypeError, "mean must be a sequence of numbers, got 0.5"),
    ({"mean": ("a", "b", "c")}, TypeError, "mean must be a sequence of numbers"),
    ({"std": (0.5, float("nan"), 0.5)}, ValueError, "std must be 3 positive numbers"),
    ({"std": (0.5, 0.0, 0.5)}, ValueError, r"std must be 3 positive numbers, one per channel, got \(0.5, 0.0, 0.5\)"),
    ({"weight": PATCH["weight"].to("meta")}, ValueError, "weight is on meta, but images is on cpu"),
    ({"keep": [[0], [1]]}, TypeError, "keep must be a torch.Tensor, got list"),
    ({"keep": torch.zeros(2, 1)}, TypeError, "keep must be int64 or int32, got float32"),
    ({"keep": KEEP[0]}, ValueError, r"keep must be \[2, K\], K at most the 4 patches of an image, got \(2,\)"),
    ({"keep": KEEP[:1]}, ValueError, r"keep must be \[2, K\].*got \(1, 2\)"),
    ({"keep": KEEP.repeat(1, 3)}, ValueError, r"K at most the 4 patches of an image, got \(2, 6\)"),
    ({"keep": KEEP.to("meta")}, ValueError, "keep is on meta, but images is on cpu"),
]


@pytest.mark.parametrize(("changed", "error", "message"), PATCH_ERRORS, ids=[case[2][:40] for case in PATCH_ERRORS])
def test_patch_embed(changed, error, message):
    with pytest.raises(error, match=f"patch_embed: .*{message}"):
        patch_embed(**(PATCH | changed))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[0, 3], [1, 4]], IndexError, r"keep must hold indices of the 4 patches, got 4 at \[1, 1\]"),
        ([[-1, 3], [1, 2]], IndexError, r"keep must hold indices of the 4 patches, got -1 at \[0, 0\]"),
        ([[0, 3], [2, 2]], ValueError, r"keep must hold each patch of an image once, got \[2, 2\]"),
    ],
)
def test_patches_that_cannot_be_kept(rows, error, message, backend):
    with pytest.raises(error, match=f"patch_embed: {message}"):
        patch_embed(**PATCH, keep=torch.tensor(rows), backend=backend)


OWNERS = torch.tensor([0, 3, 3, -1])
RANK_ERRORS = [
    ((X.tolist(), X), None, TypeError, "image must be a torch.Tensor, got list"),
    ((X, X[0]), None, ValueError, r"text must have 2 dimensions, got shape \(8,\)"),
    ((X, X.half()), None, TypeError, "text is float16, but image is float32"),
    ((X, X.to("meta")), None, ValueError, "text is on meta, but image is on cpu"),
    ((X, X[:, :7]), None, ValueError, r"the same width, got \(4, 8\) and \(4, 7\)"),
    ((X, X[:3]), None, ValueError, "as many texts as images, got 3 and 4"),
    ((X, X), [0, 1, 2, 3], TypeError, "text_image must be a torch.Tensor, got list"),
    ((X, X), OWNERS.int(), TypeError, "text_image must be int64, got int32"),
    ((X, X), OWNERS[:3], ValueError, r"text_image must be \[4\], one per text, got \(3,\)"),
    ((X, X), OWNERS.to("meta"), ValueError, "text_image is on meta, but image is on cpu"),
]


@pytest.mark.parametrize(
    ("arguments", "owners", "error", "message"), RANK_ERRORS, ids=[case[3][:40] for case in RANK_ERRORS]
)
def test_retrieval_ranks(arguments, owners, error, message):
    with pytest.raises(error, match=f"retrieval_ranks: .*{message}"):
        retrieval_ranks(*arguments, text_image=owners)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("wrong", [4, -2, 2**32])
def test_index_that_is_no_image(wrong, backend):
    message = rf"indices of the 4 images, or -1 for a text of none, got {wrong} at 2"
    with pytest.raises(ValueError, match=f"retrieval_ranks: .*{message}"):
        retrieval_ranks(X, X, text_image=torch.tensor([0, -1, wrong, 3]), backend=backend)


@pytest.mark.skipif(INTERPRET or ON_GPU, reason="Triton runs here")
def test_triton_where_it_cannot_run():
    with pytest.raises(
        RuntimeError, match=r"attention: backend='triton' cannot run on a cpu tensor.*TRITON_INTERPRET=1"
    ):
        attention(QKV, 2, backend="triton")


@pytest.mark.skipif(not INTERPRET, reason="of the interpreter")
def test_interpreter_refuses_what_it_would_get_wrong():
    with pytest.raises(TypeError, match="qkv is bfloat16, which Triton's interpreter multiplies as raw bits"):
        attention(QKV.bfloat16(), 2)
    with pytest.raises(TypeError, match="qkv is float64, which only the CPU path"):
        attention(QKV.double(), 2)


Q = torch.zeros(2, 5, 2, 8)
SEPARATE_ERRORS = [
    ((Q[0], Q, Q), {}, ValueError, r"q must have 4 dimensions, got shape \(5, 2, 8\)"),
    ((Q, Q, Q.half()), {}, TypeError, "v is float16, but q is float32"),
    ((Q, Q, Q[:, :3]), {}, ValueError, r"k and v \[B, N, H, D\], got .* and \(2, 3, 2, 8\)"),
    ((Q, Q, Q), {"scale": -1.0}, ValueError, "scale must be positive, got -1.0"),
    ((Q, Q, Q), {"causal": 1}, TypeError, "causal must be a bool, got int"),
    ((Q, Q, Q), {"seqlens": torch.ones(2)}, TypeError, "seqlens must be an int32 or int64 tensor, got float32"),
    ((Q, Q, Q), {"seqlens": [5, 5]}, TypeError, "seqlens must be an int32 or int64 tensor, got list"),
    ((Q, Q, Q), {"seqlens": torch.tensor([5])}, ValueError, r"seqlens must be \[2\] on cpu, got \(1,\) on cpu"),
]


@pytest.mark.parametrize(("args", "options", "error", "match"), SEPARATE_ERRORS)
def test_attention_of_separate_tensors(args, options, error, match):
    with pytest.raises(error, match="attention_qkv: .*" + match):
        attention_qkv(*args, **options)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((X[None], X[None, :, :5]), r"tokens \[B, N, C\] with at least one token, got \(1, 4, 8\) and \(1, 4, 5\)"),
        ((X[None], X[None, :0]), "at least one token"),
        ((X[None], torch.zeros(1, 1100, 8)), "at most 64 queries and 1024 tokens, got 4 and 1100"),
        ((X[None], X[None], torch.ones(2, dtype=torch.int64)), r"seqlens must be \[1\] on cpu, got \(2,\) on cpu"),
        ((X[None], X[None], torch.ones(1)), "seqlens must be an int32 or int64 tensor, got float32"),
    ],
)
def test_attention_pool(args, match):
    with pytest.raises((ValueError, TypeError), match="attention_pool: .*" + match):
        attention_pool(*args[:2], seqlens=args[2] if len(args) > 2 else None)


def test_bias_of_another_size():
    with pytest.raises(ValueError, match=r"attention: bias must be \[48\] on cpu, got \(47,\) on cpu"):
        attention(QKV, 2, bias=torch.zeros(47))
