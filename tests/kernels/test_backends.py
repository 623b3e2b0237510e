"""Each op runs on the backend that it is asked for."""

import sys

import pytest

from clipfast.kernels import (
    attention,
    bias_gelu,
    contrastive_loss,
    info_nce_loss,
    layer_norm,
    layer_norm_pair,
    patch_embed,
    reference,
    retrieval_ranks,
    sigmoid_loss,
    text_embed,
)
from clipfast.kernels.attention import cpu as attention_cpu
from clipfast.kernels.attention import launches as attention_launches
from clipfast.kernels.contrastive import cpu as contrastive_cpu
from clipfast.kernels.contrastive import launches, sigmoid_cpu, sigmoid_launches
from clipfast.kernels.patch_embed import cpu as patch_cpu
from clipfast.kernels.patch_embed import launches as patch_launches
from clipfast.kernels.text_embed import cpu as text_cpu
from clipfast.kernels.text_embed import launches as text_launches

from ..conftest import INTERPRET
from .test_errors import PATCH, QKV, TEXT, W, X


def paths():
    """Each op with its arguments, and where its paths are: on a CPU, and with Triton."""
    names = ("retrieval", "norm", "norm_pair", "activation")
    modules = (sys.modules[f"clipfast.kernels.{name}"] for name in names)
    retrieval, norm, norm_pair, activation = modules
    return {
        "contrastive_loss": (
            lambda **options: contrastive_loss(X, X, 1.0, **options),
            (contrastive_cpu, "stats"),
            (launches, "stats"),
        ),
        "info_nce_loss": (
            lambda **options: info_nce_loss(X, X, 1.0, negatives=X, in_batch=False, **options),
            (contrastive_cpu, "stats"),
            (launches, "stats"),
        ),
        "sigmoid_loss": (
            lambda **options: sigmoid_loss(X, X, 1.0, 0.0, **options),
            (sigmoid_cpu, "sums"),
            (sigmoid_launches, "sums"),
        ),
        "attention": (
            lambda **options: attention(QKV, 2, **options),
            (attention_cpu, "forward"),
            (attention_launches, "forward"),
        ),
        "layer_norm": (
            lambda **options: layer_norm(X, W, W, **options),
            (norm, "_fwd_cpu"),
            (norm, "_fwd_triton"),
        ),
        "layer_norm_pair": (
            lambda **options: layer_norm_pair(X, W, W, W, W, **options),
            (norm_pair, "_fwd_cpu"),
            (norm_pair, "_fwd_triton"),
        ),
        "bias_gelu": (
            lambda **options: bias_gelu(X, W, **options),
            (activation, "_fwd_cpu"),
            (activation, "_fwd_triton"),
        ),
        "patch_embed": (
            lambda **options: patch_embed(**PATCH, **options),
            (patch_cpu, "forward"),
            (patch_launches, "forward"),
        ),
        "text_embed": (
            lambda **options: text_embed(**TEXT, **options),
            (text_cpu, "forward"),
            (text_launches, "forward"),
        ),
        "retrieval_ranks": (
            lambda **options: retrieval_ranks(X, X, **options),
            (retrieval, "_ahead_cpu"),
            (retrieval, "_ahead_triton"),
        ),
    }


@pytest.mark.parametrize("name", paths())
@pytest.mark.parametrize(
    "backend",
    ["auto", "torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRET, reason="no Triton here"))],
)
def test_backend_is_the_one_that_runs(name, backend, monkeypatch):
    call, on_cpu, with_triton = paths()[name]
    ran = []
    specification = "pairwise_loss" if name == "contrastive_loss" else name
    monkeypatch.setattr(reference, specification, lambda *args, **kwargs: (ran.append("torch"), X)[1])
    for (owner, attribute), kind in ((with_triton, "triton"), (on_cpu, "cpu")):
        original = getattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, lambda *args, _o=original, _k=kind: (ran.append(_k), _o(*args))[1])
    call(backend=backend)
    automatic = "triton" if INTERPRET else "cpu"
    assert ran == [automatic if backend == "auto" else backend]
